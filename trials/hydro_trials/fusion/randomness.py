"""Random draws of lanes, one generator each.

`vmap` would draw for all lanes from one generator, so that what a lane gets depended on its row and its company. Here
every lane has a generator of its own, seeded anew for each step from the trial's seed and the step: what it draws is
what plain torch draws after `torch.manual_seed(seed)` (on a CPU, for contiguous tensors), whatever other lanes do, and
resuming needs nothing but the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

_ALPHA = 1.7580993408473766
"""The negative of SELU's lowest value (Klambauer et al. 2017): alpha dropout sets dropped values to minus this."""

Draw = Callable[..., Any]


class LaneGenerators:
    """One generator per lane."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generators: list[torch.Generator] = []
        self._active: Sequence[torch.Generator] = ()

    def seed(self, seeds: Sequence[int]) -> None:
        """Begin a pass: row f draws from seeds[f] on."""
        while len(self._generators) < len(seeds):
            self._generators.append(torch.Generator(self._device))
        self._active = self._generators[: len(seeds)]
        for generator, seed in zip(self._active, seeds, strict=True):
            generator.manual_seed(seed)

    def draw(self, lane: Tensor, function: Draw, *args: Any, **kwargs: Any) -> Tensor:
        """`function(*args, generator=..., **kwargs)` once per lane.

        Args:
            lane: A row, as a tensor without dimensions; under vmap, all of them.
            function: Draws for one lane.
            args: Tensors among them, and in `kwargs`, are the lane's own.
        """
        flat, spec = tree_flatten((args, kwargs))
        flat = [item.detach() if isinstance(item, Tensor) else item for item in flat]
        drawn: Tensor = _Drawn.apply(lane, (function, spec, self._active), *flat)  # type: ignore[no-untyped-call]
        return drawn

    def noise(self, lane: Tensor, shape: Sequence[int], like: Tensor, keep: float) -> Tensor:
        """1 with probability `keep`, else 0; dtype and device of `like`."""
        return self.draw(lane, bernoulli, tuple(shape), like.dtype, like.device, keep)


class _Drawn(torch.autograd.Function):
    @staticmethod
    def forward(lane: Tensor, call: tuple[Draw, Any, Sequence[torch.Generator]], *flat: Any) -> Tensor:
        return _draw_one(call, 0, flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], lane: Tensor, call: Any, *flat: Any) -> tuple[Tensor, int]:
        rows = []
        for row in range(info.batch_size):
            own = [item if dim is None else item.select(dim, row) for item, dim in zip(flat, in_dims[2:], strict=True)]
            rows.append(_draw_one(call, row, own))
        return torch.stack(rows), 0


def _draw_one(call: tuple[Draw, Any, Sequence[torch.Generator]], row: int, flat: Sequence[Any]) -> Tensor:
    function, spec, generators = call
    args, kwargs = tree_unflatten(list(flat), spec)
    drawn: Tensor = function(*args, generator=generators[row], **kwargs)
    return drawn


def bernoulli(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, keep: float, generator: torch.Generator
) -> Tensor:
    """A draw of zeros and ones."""
    return torch.empty(shape, dtype=dtype, device=device).bernoulli_(keep, generator=generator)


def dropped(x: Tensor, noise: Tensor, p: float, *, alpha: bool = False, inplace: bool = False) -> Tensor:
    """Apply a draw of zeros and ones as dropout does, in the order of operations that torch has."""
    if alpha:
        a = 1.0 / ((_ALPHA * _ALPHA * p + 1) * (1 - p)) ** 0.5
        shift = noise.add(-1).mul_(_ALPHA * a).add_(_ALPHA * a * p)
        scale = noise.mul_(a)
        return x.mul_(scale).add_(shift) if inplace else x * scale + shift
    noise.div_(1 - p)
    return x.mul_(noise) if inplace else x * noise
