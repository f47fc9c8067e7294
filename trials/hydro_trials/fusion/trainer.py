"""F lanes of one study, trained as one program. Lanes come and go; none of them notices the others.

A step is a transaction: everything that may block or be interrupted (data, forward, backward) works on copies or leaves
the lanes untouched; then parameters, optimizer state, buffers and step counters change together. So the gate may throw
the bundle out at any boundary, and what is then checkpointed is the state after a whole number of steps.

Shape suffixes: F = lanes, B = samples per lane, P = values per row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hydro_slurm.errors import FusionError
from hydro_trials.fusion.layout import FlatLayout
from hydro_trials.fusion.optimizers import FusedOptimizer, LaneSettings
from hydro_trials.fusion.program import Check, FusedProgram
from hydro_trials.fusion.streams import SampleStream, derive_seed
from hydro_trials.study import Data, Study
from hydro_trials.surrogate import Surrogate, check_readouts


@dataclass(frozen=True)
class LaneState:
    """Everything that makes a lane go on where it stopped; every tensor is a copy of its own."""

    step: int
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]


@dataclass
class Lane:
    """One trial in the bundle; its row is its place in `FusedTrainer.lanes`."""

    trial: int
    seed: int
    values: dict[str, float]
    stream: SampleStream
    step: int = 0
    settings: LaneSettings = field(init=False)

    def __post_init__(self) -> None:
        self.advance(self.step)

    def advance(self, step: int) -> None:
        self.step = step
        self.settings = LaneSettings(step, self.values)


class FusedTrainer:
    """Trains lanes that differ in hyperparameters, seed and progress.

    Args:
        study: What is trained.
        surrogate: The model at the width of these lanes.
        data: The study's samples.
        num_steps: The whole budget, which schedules refer to.
        check: Called at every boundary between quanta. It may raise: the step is then as if never begun.
    """

    def __init__(self, study: Study, surrogate: Surrogate, data: Data, num_steps: int, check: Check) -> None:
        self.study, self.surrogate, self.data, self.check = study, surrogate, data, check
        self._template = surrogate.make(0)
        self.layout = FlatLayout.of(self._template)
        self.program = FusedProgram(self._template, study.loss, check)
        self.optimizer = FusedOptimizer(study.optimizer, study.schedule, num_steps, self.layout, surrogate.rules)
        self.lanes: list[Lane] = []
        self._buffers = {name: tensor.unsqueeze(0)[:0] for name, tensor in self._constants(self._template).items()}
        self._flat_FP = torch.zeros(0, self.layout.row_size, dtype=self.layout.dtype)
        self._slots = {name: torch.zeros_like(self._flat_FP) for name in self.optimizer.slot_names}
        self._finite_F = torch.ones(0, dtype=torch.bool)
        self._num_finite_F = torch.zeros(0, dtype=torch.long)
        self.losses_F = torch.zeros(0, dtype=self.layout.dtype)
        self._checked_readouts = False
        self._relayout()

    @property
    def trials(self) -> list[int]:
        return [lane.trial for lane in self.lanes]

    def lane(self, trial: int) -> Lane:
        return self.lanes[self.trials.index(trial)]

    def admit(self, trial: int, seed: int, values: Mapping[str, float], state: LaneState | None = None) -> None:
        """Add one lane, new or going on from `state`.

        Raises:
            FusionError: The trial is here already, or `state` belongs to another model or optimizer.
        """
        if trial in self.trials:
            raise FusionError(f"trial {trial} is in this bundle already")
        if state is None:
            module = self.surrogate.make(derive_seed(seed, "init"))
            state = LaneState(
                0, {name: p.detach() for name, p in module.named_parameters()}, self._constants(module), {}
            )
        row_P = self.layout.pack(state.parameters)
        slots = {
            name: self.layout.pack(state.optimizer[name]) if name in state.optimizer else torch.zeros_like(row_P)
            for name in self.optimizer.slot_names
        }
        if state.optimizer and set(state.optimizer) != set(slots):
            raise FusionError(
                f"the checkpoint of trial {trial} holds optimizer state {', '.join(sorted(state.optimizer))}, "
                f"needed {', '.join(slots)}; it was written by another optimizer"
            )
        for name, stacked in self._buffers.items():
            if name not in state.buffers or state.buffers[name].shape != stacked.shape[1:]:
                raise FusionError(f"the checkpoint of trial {trial} has no fitting buffer {name}; is this another model?")
        num_samples = len(self.data.train[0])
        stream = SampleStream(seed, num_samples, self.study.batch_size)
        # Everything that can fail is done: from here on the lane is in.
        self._flat_FP = torch.cat([self._flat_FP, row_P.unsqueeze(0)])
        self._slots = {name: torch.cat([old, slots[name].unsqueeze(0)]) for name, old in self._slots.items()}
        self._buffers = {
            name: torch.cat([old, state.buffers[name].detach().unsqueeze(0)]) for name, old in self._buffers.items()
        }
        self._finite_F = torch.cat([self._finite_F, torch.ones(1, dtype=torch.bool)])
        self._num_finite_F = torch.cat([self._num_finite_F, torch.tensor([state.step])])
        self.losses_F = torch.cat([self.losses_F, torch.full((1,), torch.nan, dtype=self.losses_F.dtype)])
        self.lanes.append(Lane(trial, seed, dict(values), stream, state.step))
        self._relayout()

    def drop(self, trials: Collection[int]) -> None:
        """Remove lanes; the others keep parameters, buffers, optimizer state and step."""
        rows = [row for row, lane in enumerate(self.lanes) if lane.trial not in trials]
        if len(rows) == len(self.lanes):
            return
        kept = torch.tensor(rows, dtype=torch.long)
        self._flat_FP = self._flat_FP.index_select(0, kept)
        self._slots = {name: old.index_select(0, kept) for name, old in self._slots.items()}
        self._buffers = {name: old.index_select(0, kept) for name, old in self._buffers.items()}
        self._finite_F = self._finite_F.index_select(0, kept)
        self._num_finite_F = self._num_finite_F.index_select(0, kept)
        self.losses_F = self.losses_F.index_select(0, kept)
        self.lanes = [self.lanes[row] for row in rows]
        self._relayout()

    def step(self) -> None:
        """One optimizer step of every lane."""
        x_FB, y_FB = self._batch()
        self.check()
        buffers = {name: tensor.clone() for name, tensor in self._buffers.items()}
        losses_F, gradients = self.program.gradients(self._parameters, buffers, x_FB, y_FB)
        if not self._checked_readouts:
            check_readouts(self.surrogate, self._template)
            self._checked_readouts = True
        self.check()
        grad_FP = self._flatten(gradients)
        self.check()
        self.optimizer.update(
            self._flat_FP, grad_FP, self._slots, [lane.settings for lane in self.lanes], self._quiet_check
        )
        self._buffers, self.losses_F = buffers, losses_F
        self._finite_F &= losses_F.isfinite()
        self._num_finite_F += self._finite_F
        for lane in self.lanes:
            lane.advance(lane.step + 1)
        self._raise_late()

    def diverged(self, *, thorough: bool) -> dict[int, tuple[int, str]]:
        """Lanes that are no longer finite: trial to (last finite step, reason).

        Args:
            thorough: Look at parameters too, not only at the losses seen since the lane began.
        """
        bad_F = ~self._finite_F
        weights_F = ~self._flat_FP.isfinite().all(dim=1) if thorough else torch.zeros_like(bad_F)
        found = {}
        for row in (bad_F | weights_F).nonzero().flatten().tolist():
            step = int(self._num_finite_F[row])
            if bool(bad_F[row]):
                reason = f"training loss was not finite at step {step + 1}"
            else:
                reason = f"parameters are not finite after step {step}"
            found[self.lanes[row].trial] = (step, reason)
        return found

    def evaluate(self, trials: Collection[int]) -> dict[int, dict[str, float]]:
        """The loss and every metric on the validation set, by trial; keys `valid.loss`, `valid.NAME`."""
        rows = [row for row, lane in enumerate(self.lanes) if lane.trial in trials]
        kept = torch.tensor(rows, dtype=torch.long)
        parameters = {name: tensor.detach().index_select(0, kept) for name, tensor in self._parameters.items()}
        buffers = {name: tensor.index_select(0, kept) for name, tensor in self._buffers.items()}
        x_N, y_N = self.data.valid
        outputs_FN = self.program.outputs(parameters, buffers, x_N, self.study.batch_size)
        results: dict[int, dict[str, float]] = {}
        for row, output_N in zip(rows, outputs_FN, strict=True):
            with torch.no_grad():
                values = {"valid.loss": float(self.study.loss(output_N, y_N))}
                for name, metric in self.study.metrics.items():
                    values[f"valid.{name}"] = float(metric(output_N, y_N))
            results[self.lanes[row].trial] = values
            self.check()
        return results

    def state(self, trial: int) -> LaneState:
        """A copy of one lane, for a checkpoint; shares no memory with the bundle."""
        row = self.trials.index(trial)
        return LaneState(
            step=self.lanes[row].step,
            parameters=self.layout.unpack(self._flat_FP[row]),
            buffers={name: tensor[row].clone() for name, tensor in self._buffers.items()},
            optimizer={name: self.layout.unpack(tensor[row]) for name, tensor in self._slots.items()},
        )

    def state_bytes(self) -> int:
        """Memory of all lanes' parameters, optimizer state and buffers, in bytes."""
        tensors = [self._flat_FP, *self._slots.values(), *self._buffers.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _batch(self) -> tuple[Tensor, Tensor]:
        index = torch.cat([lane.stream.indices(lane.step) for lane in self.lanes])
        shape = (len(self.lanes), self.study.batch_size)
        x_N, y_N = self.data.train
        x_FB = x_N.index_select(0, index).view(*shape, *x_N.shape[1:])
        return x_FB, y_N.index_select(0, index).view(*shape, *y_N.shape[1:])

    def _flatten(self, gradients: Sequence[Tensor]) -> Tensor:
        num_lanes = len(self.lanes)
        pieces = []
        for gradient, gap in zip(gradients, self._gaps, strict=True):
            pieces.append(gradient.reshape(num_lanes, -1))
            if gap is not None:
                pieces.append(gap)
        return torch.cat(pieces, dim=1)

    def _relayout(self) -> None:
        """Make the parameters' views and the zeros between their gradients anew, after rows have changed."""
        views = self.layout.views(self._flat_FP)
        self._parameters = {name: view.detach().requires_grad_() for name, view in views.items()}
        num_lanes = len(self.lanes)
        self._gaps = [
            torch.zeros(num_lanes, size, dtype=self.layout.dtype) if size else None for size in self.layout.gaps()
        ]
        self._late: BaseException | None = None

    def _constants(self, module: nn.Module) -> dict[str, Tensor]:
        """Buffers and frozen parameters: stacked like parameters, touched by no optimizer."""
        frozen = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
        return {**frozen, **dict(module.named_buffers())}

    def _quiet_check(self) -> None:
        """A boundary inside the update: an exception waits until the update is whole."""
        if self._late is None:
            try:
                self.check()
            except BaseException as error:
                self._late = error

    def _raise_late(self) -> None:
        if self._late is not None:
            late, self._late = self._late, None
            raise late


