"""The fast path: lanes by batched kernels instead of vmap, for models that torch.fx can trace.

What it cannot prove to mean the same it refuses when it is made, and `agreement` compares it with the general
path on one batch before it is used.

Shape suffixes: F = lanes, B = samples per lane, N = samples.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from hydro_trials.fusion import kernels, sites
from hydro_trials.fusion.batch import LaneBatch
from hydro_trials.fusion.folding import LANE_MAJOR, SHARED, Value
from hydro_trials.fusion.intercept import lane_functions
from hydro_trials.fusion.lane_ops import Pass
from hydro_trials.fusion.program import (
    FAST,
    Check,
    Gradients,
    Loss,
    boundary_modules,
    check_scalar,
    lower_precision,
    weighted_loss,
)
from hydro_trials.fusion.randomness import LaneGenerators
from hydro_trials.fusion.tracing import LaneGraph, state_names
from hydro_trials.samples import Tree, call_model, concatenate, in_chunks


class FastProgram:
    """A model's forward, loss and gradients over lanes, by batched kernels.

    Args:
        module: One lane's model; its structure is used, and what it holds frozen.
        loss: The study's loss, an ordinary function of one lane.
        check: Called at every module boundary, forward and backward.
        dtype: What to compute in, if not in the parameters' own type.
        depth: How deep into the module tree boundaries lie; None for all.

    Raises:
        FusionError: The model has something that the fast path does not know: names it, and its module.
    """

    kind = FAST

    def __init__(
        self, module: nn.Module, loss: Loss, check: Check, *, dtype: torch.dtype | None = None, depth: int | None = None
    ) -> None:
        self.module, self.loss, self.dtype, self._check = module, loss, dtype, check
        boundaries = boundary_modules(module, depth)
        self._training = LaneGraph(module.train(), boundaries)
        self._evaluation = LaneGraph(module.eval(), boundaries)
        self._device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._generators = LaneGenerators(self._device)
        self._loss_draws = loss is not F.cross_entropy
        names = state_names(module)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self._own = {name: tensor.detach() for name, tensor in tensors.items() if names[name] == name}

    @property
    def draws(self) -> bool:
        """Whether the model may draw random numbers in training."""
        return self._training.draws

    def set_check(self, check: Check) -> None:
        """Have another gate asked at the boundaries."""
        self._check = check

    def gradients(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: LaneBatch
    ) -> tuple[Tensor, Gradients]:
        """See `Program`."""
        losses_F = self.losses(parameters, buffers, batch)
        self._check(sites.BACKWARD)
        gradients = torch.autograd.grad(losses_F.sum(), list(parameters.values()), allow_unused=True)
        return losses_F.detach(), gradients

    def losses(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: LaneBatch) -> Tensor:
        """Losses (F,), ready for differentiation; `buffers` change.

        Raises:
            FusionError: The loss is no scalar.
        """
        if self._training.draws or self._loss_draws:
            self._generators.seed(batch.seeds)
        with lower_precision(self.dtype, self._device.type):
            run = self._pass(self._training, parameters, buffers, batch.num_lanes)
            output = self._forward(self._training, run, batch.x, SHARED if batch.shared else LANE_MAJOR)
            return self._losses_of(output, batch)

    def undrawn_losses(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Tree, y: Tree, shared: bool, num: int
    ) -> Tensor:
        """As `losses`, of `num` lanes, in a form that compiles: vmap refuses a loss that draws random numbers.

        The model must not draw either; see `draws`.
        """
        with lower_precision(self.dtype, self._device.type):
            run = self._pass(self._training, parameters, buffers, num)
            output = self._forward(self._training, run, x, SHARED if shared else LANE_MAJOR)
            of_lanes = vmap(lambda *own: check_scalar(self.loss(*own)), in_dims=(0, None if shared else 0))
            losses_F: Tensor = of_lanes(output, y)
        return losses_F

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
        if self._evaluation.draws:
            self._generators.seed(seeds)
        run = self._pass(self._evaluation, parameters, buffers, len(seeds))
        parts = []
        for x_B in in_chunks(x_N, chunk):
            self._check(sites.EVALUATE)
            parts.append(self._forward(self._evaluation, run, x_B, SHARED))
        return concatenate(parts, dim=1)

    def _pass(
        self, graph: LaneGraph, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], num_lanes: int
    ) -> Pass:
        state = {**parameters, **buffers}
        if len(state) < len(self._own):  # what is frozen is the module's own, for every lane
            for name, tensor in self._own.items():
                state.setdefault(name, tensor.expand(num_lanes, *tensor.shape))
        return Pass(state, num_lanes, self._generators, self._check, training=graph is self._training)

    def _forward(self, graph: LaneGraph, run: Pass, x: Tree, layout: int) -> Tree:
        values = tree_map(lambda t: Value(t, layout, run.num_lanes) if isinstance(t, Tensor) else t, x)
        output = call_model(lambda *args, **kwargs: graph.run.forward(run, *args, **kwargs), values)
        return tree_map(lambda t: t.lanes() if type(t) is Value else t, output)

    def _losses_of(self, output: Tree, batch: LaneBatch) -> Tensor:
        if self.loss is F.cross_entropy and batch.weights_FB is None and _are_classes(output, batch.y):
            return kernels.cross_entropy(output, batch.y.unsqueeze(0) if batch.shared else batch.y)
        lanes_F = torch.arange(batch.num_lanes, device=self._device)
        if self._loss_draws:  # what a loss draws like its output follows that tensor's order in memory
            output = tree_map(lambda t: t.contiguous() if isinstance(t, Tensor) else t, output)
        samples = None if batch.shared else 0
        if batch.weights_FB is None:
            losses_F: Tensor = vmap(self._lane_loss, in_dims=(0, samples, 0))(output, batch.y, lanes_F)
            return losses_F
        of_lanes = vmap(self._weighted_loss, in_dims=(0, samples, 0, 0))
        weighted_F: Tensor = of_lanes(output, batch.y, lanes_F, batch.weights_FB)
        return weighted_F

    def _lane_loss(self, output_B: Tree, y_B: Tree, lane: Tensor) -> Tensor:
        with lane_functions(lane, self._generators if self._loss_draws else None) as mode:
            loss = check_scalar(self.loss(output_B, y_B))
        self._loss_draws = mode is not None and mode.num_handled > 0
        return loss

    def _weighted_loss(self, output_B: Tree, y_B: Tree, lane: Tensor, weights_B: Tensor) -> Tensor:
        with lane_functions(lane, self._generators if self._loss_draws else None) as mode:
            loss = weighted_loss(self.loss, output_B, y_B, weights_B)
        self._loss_draws = mode is not None and mode.num_handled > 0
        return loss


def _are_classes(output: Tree, y: Tree) -> bool:
    return isinstance(output, Tensor) and isinstance(y, Tensor) and not y.is_floating_point() and output.dim() > 2
