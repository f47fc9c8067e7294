"""Attention whose head size shrinks: its scores are scaled as muP wants them, 1/d instead of 1/sqrt(d).

Scores of a surrogate with heads of size d are multiplied by sqrt(d_target) / d, which is 1/sqrt(d) where d is the
target's. Nothing is to be done where only the number of heads shrinks, which is therefore the better way.

Source: Yang et al., Tensor Programs V (2022), definition 4.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hydro_slurm.errors import SurrogateError

_SIZE_NAMES = ("head_dim", "key_value_proj_dim", "head_size", "attention_head_size", "dim_head", "d_head")
_SCALE_NAMES = ("scaling", "scale", "softmax_scale")


@dataclass(frozen=True)
class HeadFactor:
    """How one attention module's scores are scaled."""

    factor: float
    """On the scores that the module computes by itself: sqrt(d_target / d)."""
    attribute: str | None
    """The attribute that holds its 1/sqrt(d); None where the keys' input is multiplied instead."""


def head_factors(target: nn.Module, surrogate: nn.Module) -> dict[str, HeadFactor]:
    """The attention modules that need a factor, by name.

    Raises:
        SurrogateError: A head size shrinks in a module that offers no way to scale its scores.
    """
    narrow = dict(surrogate.named_modules())
    found = {}
    for name, module in target.named_modules():
        size, narrow_size = _head_size(module), _head_size(narrow[name])
        if size is None or narrow_size is None or size == narrow_size:
            continue
        attribute = _scale_attribute(module, size)
        if attribute is None and (not isinstance(module, nn.MultiheadAttention) or module.bias_k is not None):
            raise SurrogateError(
                f"module {name or 'of the model'} ({type(module).__name__}): its head size shrinks from {size} to "
                f"{narrow_size}, and its scores cannot be scaled from outside; shrink the number of heads and keep "
                "their size"
            )
        found[name] = HeadFactor(math.sqrt(size / narrow_size), attribute)
    return found


def scale_scores(module: nn.Module, factor: HeadFactor) -> None:
    """Apply a factor to one attention module of a surrogate."""
    if factor.attribute is not None:
        setattr(module, factor.attribute, getattr(module, factor.attribute) * factor.factor)
    else:
        module.register_forward_pre_hook(_ScaleKeys(factor.factor), with_kwargs=True)


class _ScaleKeys:
    """Forward pre-hook of nn.MultiheadAttention: multiplies what keys are made of.

    Scores are linear in the keys. The keys' bias adds the same to all scores of a query, which softmax takes out again:
    so it need not be multiplied.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "key" in kwargs:
            return args, {**kwargs, "key": kwargs["key"] * self.factor}
        key: Tensor = args[1]
        return (args[0], key * self.factor, *args[2:]), kwargs


def _head_size(module: nn.Module) -> int | None:
    for name in _SIZE_NAMES:
        size = getattr(module, name, None)
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            return size
    return None


def _scale_attribute(module: nn.Module, size: int) -> str | None:
    for name in _SCALE_NAMES:
        value = getattr(module, name, None)
        if isinstance(value, float) and math.isclose(value, size**-0.5, rel_tol=1e-6):
            return name
    return None
