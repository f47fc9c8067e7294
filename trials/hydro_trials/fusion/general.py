"""The general path: the user's ordinary single-model forward and loss under torch.func.vmap.

Parameters and buffers are stacked; what is differentiated is the *sum* of the lanes' losses, so every lane's gradient
is exactly its own. Differentiation happens outside vmap: on a small network this takes two thirds of the time of
vmap(grad(...)), and gives the same numbers.

Shape suffixes: F = lanes, B = samples per lane, N = samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from hydro_trials.fusion import sites
from hydro_trials.fusion.batch import LaneBatch
from hydro_trials.fusion.intercept import lane_functions
from hydro_trials.fusion.lower_precision import LanePrecision
from hydro_trials.fusion.program import GENERAL, Boundaries, Check, Gradients, Loss, check_scalar, weighted_loss
from hydro_trials.fusion.randomness import LaneGenerators
from hydro_trials.fusion.refusal import refusal
from hydro_trials.samples import Tree, call_model, concatenate, in_chunks


class GeneralProgram:
    """A model's forward, loss and gradients over lanes.

    Args:
        module: One lane's model; only its structure is used, its parameters are handed in.
        loss: The study's loss.
        check: Called at every module boundary, forward and backward.
        dtype: What to compute in, if not in the parameters' own type.
        depth: How deep into the module tree boundaries lie; None for all.
    """

    kind = GENERAL

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        check: Check,
        *,
        dtype: torch.dtype | None = None,
        depth: int | None = None,
        use_unwrap: bool = True,
    ) -> None:
        self.module, self.loss = module, loss
        self.boundaries = Boundaries(module, check, depth=depth, use_unwrap=use_unwrap)
        self._device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._precision = None if dtype is None else LanePrecision(dtype, self._device)
        self._generators: LaneGenerators | None = LaneGenerators(self._device)
        self._is_intercepted = False
        self._output: tuple[list[tuple[Any] | None], Any] = ([], None)

    def set_check(self, check: Check) -> None:
        """Have another gate asked at the boundaries."""
        self.boundaries.check = check

    def gradients(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: LaneBatch
    ) -> tuple[Tensor, Gradients]:
        """See `Program`.

        Raises:
            NotFusableError: vmap cannot transform the model or its loss.
            FusionError: The loss is no scalar.
        """
        self.module.train()
        with self._explained(lambda: self._losses(dict(parameters), _copied(buffers), batch)):
            losses_F = self._losses(dict(parameters), dict(buffers), batch)
            self.boundaries.check(sites.BACKWARD)
            gradients = torch.autograd.grad(losses_F.sum(), list(parameters.values()), allow_unused=True)
        if not self._is_intercepted:
            self._generators = None  # the model calls nothing of the kind: no need to look at its every call
        return losses_F.detach(), gradients

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
        parts = []
        lanes_F = self._seeded(seeds)
        for x_B in in_chunks(x_N, chunk):
            self.boundaries.check(sites.EVALUATE)

            def run(x_B: Tree = x_B) -> tuple[Tensor, ...]:
                lanes = vmap(self._lane_output)
                found: tuple[Tensor, ...] = lanes(dict(parameters), dict(buffers), _for_all(x_B, len(seeds)), lanes_F)
                return found

            with self._explained(run):
                parts.append(self._whole_output(run()))
        return concatenate(parts, dim=1)

    def _losses(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: LaneBatch) -> Tensor:
        lanes_F = self._seeded(batch.seeds)
        x_FB, y_FB = batch.x, batch.y
        if batch.shared:  # as if each lane had its own: what a lane computes must not depend on its company
            x_FB, y_FB = _for_all(x_FB, batch.num_lanes), _for_all(y_FB, batch.num_lanes)
        if batch.weights_FB is None:
            return vmap(self._lane_loss)(parameters, buffers, x_FB, y_FB, lanes_F)
        return vmap(self._weighted_loss)(parameters, buffers, x_FB, y_FB, lanes_F, batch.weights_FB)

    def _lane_output(
        self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x_B: Tree, lane: Tensor
    ) -> tuple[Tensor, ...]:
        with lane_functions(lane, self._generators):
            leaves, spec = tree_flatten(self._forward(parameters, buffers, x_B))
        self._output = ([None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves], spec)
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def _whole_output(self, tensors: tuple[Tensor, ...]) -> Tree:
        """The model's output again, with its parts that are no tensors."""
        others, spec = self._output
        rest = iter(tensors)
        return tree_unflatten([next(rest) if other is None else other[0] for other in others], spec)

    def _forward(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x_B: Tree) -> Any:
        state = {**parameters, **buffers}
        return call_model(lambda *args, **kwargs: functional_call(self.module, state, args, kwargs), x_B)

    def _lane_loss(
        self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x_B: Tree, y_B: Tree, lane: Tensor
    ) -> Tensor:
        with lane_functions(lane, self._generators, self._precision) as mode:
            loss = check_scalar(self.loss(self._forward(parameters, buffers, x_B), y_B))
        self._is_intercepted |= mode is not None and mode.num_handled > 0
        return loss

    def _weighted_loss(
        self,
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        x_B: Tree,
        y_B: Tree,
        lane: Tensor,
        weights_B: Tensor,
    ) -> Tensor:
        with lane_functions(lane, self._generators, self._precision) as mode:
            loss = weighted_loss(self.loss, self._forward(parameters, buffers, x_B), y_B, weights_B)
        self._is_intercepted |= mode is not None and mode.num_handled > 0
        return loss

    def _seeded(self, seeds: tuple[int, ...]) -> Tensor:
        if self._generators is not None:
            self._generators.seed(seeds)
        return torch.arange(len(seeds), device=self._device)

    @contextmanager
    def _explained(self, again: Callable[[], object]) -> Iterator[None]:
        """Turn vmap's refusals into errors that say what cannot be fused, and where."""
        try:
            yield
        except (RuntimeError, NotImplementedError, ValueError) as error:
            check, self.boundaries.check = self.boundaries.check, lambda site: None
            try:
                found = refusal(self.module, error, again)
            finally:
                self.boundaries.check = check
            if found is None:
                raise
            raise found from error


def _copied(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in buffers.items()}


def _for_all(tree: Tree, num_lanes: int) -> Tree:
    """Every tensor with a dimension of lanes in front, without a copy."""
    return tree_map(lambda leaf: leaf.unsqueeze(0).expand(num_lanes, *leaf.shape), tree)
