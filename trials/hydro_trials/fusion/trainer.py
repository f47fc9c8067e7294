"""F lanes of one study, trained as one program. Lanes come and go; none of them notices the others.

A step is a transaction: everything that may block or be interrupted (data, forward, backward) works on copies or leaves
the lanes untouched; then parameters, optimizer state, buffers and step counters change together. So the gate may throw
the bundle out at any boundary, and what is then checkpointed is the state after a whole number of steps.

Shape suffixes: F = lanes, B = samples per lane, P = values per row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hydro_slurm.errors import FusionError
from hydro_trials.fusion import sites
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


@dataclass
class _Stack:
    """Tensors with one row per lane."""

    flat: Tensor
    slots: dict[str, Tensor]
    buffers: dict[str, Tensor]
    finite: Tensor
    """Whether all losses since the lane began were finite."""
    num_finite: Tensor
    """Steps up to the last finite loss."""
    losses: Tensor


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
        self._checked_readouts = False
        self._late: BaseException | None = None
        self.torn = False
        """Whether an update was broken off half way (out of memory): the lanes' state is no whole step."""
        flat_FP = torch.zeros(0, self.layout.row_size, dtype=self.layout.dtype)
        constants = self._constants(self._template)
        empty = _Stack(
            flat=flat_FP,
            slots={name: torch.zeros_like(flat_FP) for name in self.optimizer.slot_names},
            buffers={name: tensor.unsqueeze(0)[:0] for name, tensor in constants.items()},
            finite=torch.ones(0, dtype=torch.bool),
            num_finite=torch.zeros(0, dtype=torch.long),
            losses=torch.zeros(0, dtype=self.layout.dtype),
        )
        self._install(empty, [])

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
        for name, stacked in self._stack.buffers.items():
            if name not in state.buffers or state.buffers[name].shape != stacked.shape[1:]:
                raise FusionError(
                    f"the checkpoint of trial {trial} has no fitting buffer {name}; is this another model?"
                )
        num_samples = len(self.data.train[0])
        stream = SampleStream(seed, num_samples, self.study.batch_size)
        lane = Lane(trial, seed, dict(values), stream, state.step)
        one = torch.ones(1, dtype=torch.bool)
        self._install(
            _Stack(
                flat=torch.cat([self._stack.flat, row_P.unsqueeze(0)]),
                slots={k: torch.cat([old, slots[k].unsqueeze(0)]) for k, old in self._stack.slots.items()},
                buffers={
                    k: torch.cat([old, state.buffers[k].detach().unsqueeze(0)])
                    for k, old in self._stack.buffers.items()
                },
                finite=torch.cat([self._stack.finite, one]),
                num_finite=torch.cat([self._stack.num_finite, one * state.step]),
                losses=torch.cat([self._stack.losses, row_P.new_full((1,), torch.nan)]),
            ),
            [*self.lanes, lane],
        )

    def drop(self, trials: Collection[int]) -> None:
        """Remove lanes; the others keep parameters, buffers, optimizer state and step."""
        rows = [row for row, lane in enumerate(self.lanes) if lane.trial not in trials]
        if len(rows) == len(self.lanes):
            return
        kept = torch.tensor(rows, dtype=torch.long)
        old = self._stack
        self._install(
            _Stack(
                flat=old.flat.index_select(0, kept),
                slots={name: tensor.index_select(0, kept) for name, tensor in old.slots.items()},
                buffers={name: tensor.index_select(0, kept) for name, tensor in old.buffers.items()},
                finite=old.finite.index_select(0, kept),
                num_finite=old.num_finite.index_select(0, kept),
                losses=old.losses.index_select(0, kept),
            ),
            [self.lanes[row] for row in rows],
        )

    def step(self) -> None:
        """One optimizer step of every lane."""
        self.check(sites.STEP)
        x_FB, y_FB = self._batch()
        self.check(sites.FORWARD)
        stack = self._stack
        buffers = {name: tensor.clone() for name, tensor in stack.buffers.items()}
        losses_F, gradients = self.program.gradients(self._parameters, buffers, x_FB, y_FB)
        if not self._checked_readouts:
            check_readouts(self.surrogate, self._template)
            self._checked_readouts = True
        self.check(sites.FLATTEN)
        grad_FP = self._flatten(gradients)
        self.check(sites.UPDATE)
        self.torn = True
        self.optimizer.update(
            stack.flat, grad_FP, stack.slots, [lane.settings for lane in self.lanes], self._quiet_check
        )
        stack.buffers, stack.losses = buffers, losses_F
        stack.finite &= losses_F.isfinite()
        stack.num_finite += stack.finite
        for lane in self.lanes:
            lane.advance(lane.step + 1)
        self.torn = False
        self._raise_late()

    def loss(self, trial: int) -> float:
        """The lane's loss on its last training batch; not a number before its first step here."""
        return float(self._stack.losses[self.trials.index(trial)])

    def diverged(self, *, thorough: bool) -> dict[int, tuple[int, str]]:
        """Lanes that are no longer finite: trial to (last finite step, reason).

        Args:
            thorough: Look at parameters too, not only at the losses seen since the lane began.
        """
        bad_F = ~self._stack.finite
        weights_F = ~self._stack.flat.isfinite().all(dim=1) if thorough else torch.zeros_like(bad_F)
        found = {}
        for row in (bad_F | weights_F).nonzero().flatten().tolist():
            step = int(self._stack.num_finite[row])
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
        buffers = {name: tensor.index_select(0, kept) for name, tensor in self._stack.buffers.items()}
        x_N, y_N = self.data.valid
        outputs_FN = self.program.outputs(parameters, buffers, x_N, self.study.batch_size)
        results: dict[int, dict[str, float]] = {}
        for row, output_N in zip(rows, outputs_FN, strict=True):
            self.check(sites.MEASURE)
            with torch.no_grad():
                values = {"valid.loss": float(self.study.loss(output_N, y_N))}
                for name, metric in self.study.metrics.items():
                    values[f"valid.{name}"] = float(metric(output_N, y_N))
            results[self.lanes[row].trial] = values
        return results

    def state(self, trial: int) -> LaneState:
        """A copy of one lane, for a checkpoint; shares no memory with the bundle."""
        row = self.trials.index(trial)
        return LaneState(
            step=self.lanes[row].step,
            parameters=self.layout.unpack(self._stack.flat[row]),
            buffers={name: tensor[row].clone() for name, tensor in self._stack.buffers.items()},
            optimizer={name: self.layout.unpack(tensor[row]) for name, tensor in self._stack.slots.items()},
        )

    def step_bytes(self) -> int:
        """Estimate of what a step of all lanes needs: their state, gradients twice over and two temporaries."""
        stack = self._stack
        tensors = [stack.flat, *stack.slots.values(), *stack.buffers.values(), *[stack.flat] * 4]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def set_check(self, check: Check) -> None:
        """Have another gate asked at the boundaries."""
        self.check = self.program.check = check

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

    def _install(self, stack: _Stack, lanes: list[Lane]) -> None:
        """Put other rows in place, all at once: whatever can fail has been done before."""
        views = {k: view.detach().requires_grad_() for k, view in self.layout.views(stack.flat).items()}
        gaps = [stack.flat.new_zeros(len(lanes), size) if size else None for size in self.layout.gaps()]
        self._stack, self.lanes, self._parameters, self._gaps, self.torn = stack, lanes, views, gaps, False

    def _constants(self, module: nn.Module) -> dict[str, Tensor]:
        """Buffers and frozen parameters: stacked like parameters, touched by no optimizer."""
        frozen = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
        return {**frozen, **dict(module.named_buffers())}

    def _quiet_check(self) -> None:
        """A boundary inside the update: an exception waits until the update is whole."""
        if self._late is None:
            try:
                self.check(sites.UPDATE_MORE)
            except BaseException as error:
                self._late = error

    def _raise_late(self) -> None:
        if self._late is not None:
            late, self._late = self._late, None
            raise late
