"""One forward and backward pass of F lanes of a model, with a boundary at every module.

The user's ordinary single-model loss runs under torch.func.vmap over stacked parameters and buffers; what is
differentiated is the *sum* of the lanes' losses, so every lane's gradient is exactly its own. Differentiation happens
outside vmap: on a small network this takes two thirds of the time of vmap(grad(...)), and gives the same numbers.

At every boundary the gate's check runs, in forward from a module hook and in backward from a hook on the tensor under
vmap's wrappers. Where this torch has no access to that tensor, an identity autograd.Function takes its place; it costs
0.5 ms per module and step instead of 15 us.

Shape suffixes: F = lanes, B = samples per lane, N = samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from hydro_slurm.errors import FusionError
from hydro_trials.fusion import sites

Check = Callable[[int], None]
"""Called at every boundary between quanta with the number of its site; may block, and may raise to leave."""

try:
    from torch._C import _functorch

    _is_wrapped: Callable[[Any], bool] | None = _functorch.is_batchedtensor
    _unwrap: Callable[[Any], Any] | None = _functorch.get_unwrapped
except (ImportError, AttributeError):  # private names: another torch may lack them
    _is_wrapped = _unwrap = None


class FusedProgram:
    """A model's forward, loss and gradients over lanes.

    Args:
        module: One lane's model; only its structure is used, its parameters are handed in.
        loss: `loss(output, target)` of one lane, a scalar.
        check: Called at every module boundary, forward and backward.
    """

    def __init__(
        self, module: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], check: Check, *, use_unwrap: bool = True
    ) -> None:
        refuse_unfusable(module)
        self.module, self.loss, self.check = module, loss, check
        self._use_unwrap = use_unwrap and _unwrap is not None
        self.num_boundaries = 0
        for boundary in boundary_modules(module):
            boundary.register_forward_hook(partial(self._after_forward, self.num_boundaries))
            self.num_boundaries += 1
        self._losses = vmap(self._lane_loss)
        self._outputs = vmap(self._lane_output)

    def gradients(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x_FB: Tensor, y_FB: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Losses [F], and the gradient of each lane's own loss for each of `parameters`, in their order.

        Args:
            parameters: Stacked leaves [F, ...] that require a gradient.
            buffers: Stacked [F, ...]; updated in place as the model does it.
            x_FB: Inputs (F, B, ...).
            y_FB: Targets (F, B, ...).
        """
        self.module.train()
        with _explain():
            losses_F = self._losses(dict(parameters), dict(buffers), x_FB, y_FB)
            if losses_F.dim() != 1:
                raise FusionError(
                    f"the loss of one lane has shape {tuple(losses_F.shape[1:])}, needed a scalar; "
                    "return the mean over samples"
                )
            self.check(sites.BACKWARD)
            gradients = torch.autograd.grad(losses_F.sum(), list(parameters.values()), materialize_grads=True)
        return losses_F.detach(), gradients

    @torch.no_grad()
    def outputs(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x_N: Tensor, chunk: int
    ) -> Tensor:
        """Outputs (F, N, ...) of all lanes for the same inputs, in evaluation mode, `chunk` samples at a time."""
        self.module.eval()
        parts = []
        with _explain():
            for x_B in torch.split(x_N, chunk):
                x_FB = x_B.unsqueeze(0).expand(next(iter(parameters.values())).shape[0], *x_B.shape)
                self.check(sites.EVALUATE)
                parts.append(self._outputs(dict(parameters), dict(buffers), x_FB))
        return torch.cat(parts, dim=1)

    def _lane_output(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x_B: Tensor) -> Any:
        return functional_call(self.module, {**parameters, **buffers}, (x_B,))

    def _lane_loss(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x_B: Tensor, y_B: Tensor) -> Tensor:
        loss = self.loss(self._lane_output(parameters, buffers, x_B), y_B)
        if not isinstance(loss, Tensor):
            raise FusionError(f"the loss returned {type(loss).__name__}, needed a scalar tensor")
        return loss

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


def boundary_modules(module: nn.Module) -> list[nn.Module]:
    """Modules after which the gate is asked: those that own parameters, or all leaves where none does."""
    owners = [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]
    return owners or [m for m in module.modules() if next(m.children(), None) is None]


def refuse_unfusable(module: nn.Module) -> None:
    """Raise for modules whose lanes would not be independent of each other.

    Raises:
        FusionError: A module draws random numbers in its forward.
    """
    for name, part in module.named_modules():
        name_of_probability = "p" if isinstance(part, nn.modules.dropout._DropoutNd) else "dropout"
        probability = getattr(part, name_of_probability, 0.0)
        if isinstance(probability, (int, float)) and probability > 0:
            raise FusionError(
                f"module {name or 'of the study'} ({type(part).__name__}) drops out with probability {probability:g}: "
                "lanes have no random generators of their own yet; set it to 0"
            )


@contextmanager
def _explain() -> Iterator[None]:
    """Turn vmap's refusals into errors that say what to change."""
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        if "randomness" in message and "vmap" in message:
            raise FusionError(
                "the model or its loss draws random numbers (functional dropout, noise) in forward: lanes have no "
                "random generators of their own yet; remove it"
            ) from error
        if (".item()" in message and "vmap" in message) or "data-dependent control flow" in message:
            raise FusionError(
                "the model or its loss decides by the values of a tensor (if, .item()) in forward, which differs from "
                "lane to lane; use torch.where"
            ) from error
        raise
