"""Lanes one after the other: for models that cannot be fused, and where fusing does not pay.

Optimizer, schedules and everything else stay fused; only forward and backward run lane by lane, with torch's own
random draws after `torch.manual_seed`. It is also the reference that the other ways are measured and tested against.

Shape suffixes: F = lanes, N = samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from hydro_trials.fusion import sites
from hydro_trials.fusion.batch import LaneBatch
from hydro_trials.fusion.program import SEPARATE, Boundaries, Check, Gradients, Loss, check_scalar, lower_precision
from hydro_trials.samples import Tree, call_model, concatenate, in_chunks


class SeparateProgram:
    """The plain model, called once per lane.

    Args:
        module: One lane's model; its parameters are handed in.
        loss: The study's loss.
        check: Called at every module boundary of every lane, forward and backward.
        dtype: What to compute in, if not in the parameters' own type.
        depth: How deep into the module tree boundaries lie; None for all.
    """

    kind = SEPARATE

    def __init__(
        self, module: nn.Module, loss: Loss, check: Check, *, dtype: torch.dtype | None = None, depth: int | None = None
    ) -> None:
        self.module, self.loss, self.dtype = module, loss, dtype
        self.boundaries = Boundaries(module, check, depth=depth)
        self._device = next((p.device for p in module.parameters()), torch.device("cpu"))

    def set_check(self, check: Check) -> None:
        """Have another gate asked at the boundaries."""
        self.boundaries.check = check

    def gradients(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: LaneBatch
    ) -> tuple[Tensor, Gradients]:
        """See `Program`."""
        self.module.train()
        losses, rows = [], []
        for row, seed in enumerate(batch.seeds):
            own = {name: tensor.detach()[row].requires_grad_() for name, tensor in parameters.items()}
            x_B, y_B = batch.of_lane(row)
            with _drawing_from(seed):
                with lower_precision(self.dtype, self._device.type):
                    output = self._call({**own, **{name: tensor[row] for name, tensor in buffers.items()}}, x_B)
                    loss = check_scalar(self.loss(output, y_B))
                self.boundaries.check(sites.BACKWARD)
                rows.append(torch.autograd.grad(loss, list(own.values()), allow_unused=True))
            losses.append(loss.detach())
        return torch.stack(losses), tuple(_stacked(column) for column in zip(*rows, strict=True))

    @torch.no_grad()
    def outputs(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        x_N: Tree,
        chunk: int,
        seeds: tuple[int, ...],
    ) -> Tree:
        """See `Program`."""
        self.module.eval()
        lanes = []
        for row, seed in enumerate(seeds):
            state = {name: tensor[row] for name, tensor in {**parameters, **buffers}.items()}
            parts = []
            with _drawing_from(seed):
                for x_B in in_chunks(x_N, chunk):
                    self.boundaries.check(sites.EVALUATE)
                    parts.append(self._call(state, x_B))
            lanes.append(tree_map(_with_lane, concatenate(parts, dim=0)))
        return concatenate(lanes, dim=0)

    def _call(self, state: dict[str, Tensor], x_B: Tree) -> Tree:
        return call_model(lambda *args, **kwargs: functional_call(self.module, state, args, kwargs), x_B)


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """Whatever is drawn follows from this seed; the process's own generators go on as if nothing had been."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _stacked(column: tuple[Tensor | None, ...]) -> Tensor | None:
    """One parameter's gradients of all lanes; None where no lane uses the parameter."""
    like = next((gradient for gradient in column if gradient is not None), None)
    if like is None:
        return None
    return torch.stack([torch.zeros_like(like) if gradient is None else gradient for gradient in column])


def _with_lane(leaf: object) -> object:
    return leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf
