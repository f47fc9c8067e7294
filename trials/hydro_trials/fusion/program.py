"""One forward and backward pass of F lanes of a model: what all ways of doing it have in common.

Shape suffixes: F = lanes, B = samples per lane, N = samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn, vmap
from torch.utils._pytree import tree_map

from hydro_slurm.errors import FusionError
from hydro_trials.fusion import sites
from hydro_trials.fusion.batch import LaneBatch
from hydro_trials.samples import Tree

Check = Callable[[int], None]
"""Called at every boundary between quanta with the number of its site; may block, and may raise to leave."""

Loss = Callable[[Any, Any], Tensor]
"""`loss(output, target)` of one lane: a scalar, the mean over samples."""

GENERAL, FAST, COMPILED, SEPARATE = "general", "fast", "compiled", "separate"
"""Ways of running lanes: under vmap; with batched kernels; those compiled; one lane after the other."""

Gradients = tuple[Tensor | None, ...]
"""One for each parameter, in their order; None for one that the loss does not depend on, which then stays as it is."""

PRECISIONS: dict[str, torch.dtype | None] = {"full": None, "bf16": torch.bfloat16}
"""What forward and backward compute in; parameters and optimizer state keep their own type."""


class Program(Protocol):
    """A way of computing losses and gradients of lanes."""

    @property
    def kind(self) -> str:
        """Which way this is."""
        ...

    def gradients(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: LaneBatch
    ) -> tuple[Tensor, Gradients]:
        """Losses [F], and the gradient of each lane's own loss for each of `parameters`, in their order.

        Args:
            parameters: Stacked leaves [F, ...] that require a gradient.
            buffers: Stacked [F, ...]; updated in place as the model does it.
            batch: What the lanes see.
        """
        ...

    def outputs(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        x_N: Tree,
        chunk: int,
        seeds: tuple[int, ...],
    ) -> Tree:
        """Outputs (F, N, ...) of all lanes for the same inputs, in evaluation mode, `chunk` samples at a time."""
        ...

    def set_check(self, check: Check) -> None:
        """Have another gate asked at the boundaries."""
        ...


class Boundaries:
    """Asks the gate at every module boundary of one module, forward and backward.

    In backward it is a hook on the tensor under vmap's wrappers. Where this torch has no access to that tensor, an
    identity autograd.Function takes its place; it costs 0.5 ms per module and step instead of 15 us.
    """

    def __init__(self, module: nn.Module, check: Check, *, depth: int | None = None, use_unwrap: bool = True) -> None:
        self.check = check
        self._use_unwrap = use_unwrap and _unwrap is not None
        modules = boundary_modules(module, depth)
        self.num = len(modules)
        self._hooks = [
            part.register_forward_hook(partial(self._after_forward, number)) for number, part in enumerate(modules)
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _after_forward(self, number: int, module: nn.Module, args: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            self.check(sites.in_evaluation(number))
            return None
        self.check(sites.after_forward(number))
        if not isinstance(output, Tensor):
            return None
        check = partial(self._in_backward, sites.in_backward(number))
        if not self._use_unwrap:
            identity: Tensor = _Boundary.apply(output, check)  # type: ignore[no-untyped-call]
            return identity
        assert _is_wrapped is not None and _unwrap is not None
        inner = output
        while _is_wrapped(inner):
            inner = _unwrap(inner)
        if inner.requires_grad:
            inner.register_hook(check)  # type: ignore[no-untyped-call]
        return None

    def _in_backward(self, site: int, gradient: Tensor) -> None:
        self.check(site)


try:
    from torch._C import _functorch

    _is_wrapped: Callable[[Any], bool] | None = _functorch.is_batchedtensor
    _unwrap: Callable[[Any], Any] | None = _functorch.get_unwrapped
except (ImportError, AttributeError):  # private names: another torch may lack them
    _is_wrapped = _unwrap = None


class _Boundary(torch.autograd.Function):
    """Identity whose backward calls the check."""

    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, check: Callable[[Tensor], None]) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Callable[[Tensor], None]], output: Tensor) -> None:
        ctx.check = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.check(gradient)
        return gradient, None


def boundary_modules(module: nn.Module, depth: int | None = None) -> list[nn.Module]:
    """Modules after which the gate is asked.

    Args:
        module: The model.
        depth: 0 for none, 1 for the model's children, and so on; None for every module that owns parameters, or all
            leaves where none does.
    """
    if depth is not None:
        named = [(name, part) for name, part in module.named_modules() if name]
        level = [part for name, part in named if name.count(".") == depth - 1]
        shallow = [part for name, part in named if name.count(".") < depth - 1 and not list(part.children())]
        return [*shallow, *level]
    owners = [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]
    return owners or [m for m in module.modules() if next(m.children(), None) is None]


def check_scalar(loss: object) -> Tensor:
    """What a loss returned, if it is one lane's scalar.

    Raises:
        FusionError: It is not.
    """
    if not isinstance(loss, Tensor):
        raise FusionError(f"the loss returned {type(loss).__name__}, needed a scalar tensor")
    if loss.dim() != 0:
        raise FusionError(
            f"the loss of one lane has shape {tuple(loss.shape)}, needed a scalar; return the mean over samples"
        )
    return loss


def weighted_loss(loss: Loss, output_B: Any, y_B: Any, weights_B: Tensor) -> Tensor:
    """One lane's loss, sample by sample, so that padding can be left out. Exact where the loss is a mean over samples.

    Args:
        loss: The study's loss.
        output_B: The model's output for this lane.
        y_B: Targets.
        weights_B: Weight of each sample; 0 for padding.
    """

    def of_sample(output: Any, y: Any) -> Tensor:
        return check_scalar(loss(*tree_map(lambda t: t.unsqueeze(0), (output, y))))

    losses_B: Tensor = vmap(of_sample)(output_B, y_B)
    return (losses_B.where(weights_B > 0, 0) * weights_B.to(losses_B.dtype)).sum()


@contextmanager
def lower_precision(dtype: torch.dtype | None, device: str) -> Iterator[None]:
    """Autocast of matrix products and the like to `dtype`; nothing where it is None."""
    if dtype is None:
        yield
        return
    # Without the cache of casted weights: it would keep a lane's weight alive, and the next lane would be given it.
    with torch.autocast(device, dtype=dtype, cache_enabled=False):
        yield
