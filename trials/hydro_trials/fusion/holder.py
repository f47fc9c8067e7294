"""Lanes of one study as rows of stacked tensors: they come, go, split, merge and are copied. Nothing is trained here.

Shape suffixes: F = lanes, P = values per row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hydro_slurm.errors import FusionError
from hydro_trials.fusion.lanes import Lane, LaneStack, LaneState
from hydro_trials.fusion.layout import FlatLayout
from hydro_trials.fusion.optimizers import FusedOptimizer
from hydro_trials.fusion.streams import SampleStream, derive_seed
from hydro_trials.hyperparameters import used_hyperparameters
from hydro_trials.samples import num_samples
from hydro_trials.study import Data, Study
from hydro_trials.surrogate import Surrogate


class LaneHolder:
    """The lanes of a bundle, one row each.

    Args:
        study: What is trained.
        surrogate: The model at the width of these lanes.
        data: The study's samples.
        num_steps: The whole budget, which schedules refer to.
        device: Where lanes live; samples are copied there once.
    """

    def __init__(
        self, study: Study, surrogate: Surrogate, data: Data, num_steps: int, device: torch.device | str
    ) -> None:
        self.study, self.surrogate, self.num_steps = study, surrogate, num_steps
        self.device = torch.device(device)
        self.data = data if self.device.type == "cpu" else _moved(data, self.device)
        self._template = surrogate.make(0).to(self.device)
        self.layout = FlatLayout.of(self._template)
        used = used_hyperparameters(study.optimizer, study.fixed, study.space)
        self.optimizer = FusedOptimizer(study.optimizer, study.schedule, num_steps, self.layout, surrogate.rules, used)
        self.lanes: list[Lane] = []
        self.torn = False
        """Whether an update was broken off half way (out of memory): the lanes' state is no whole step."""
        self._install(self._empty(), [])

    @property
    def trials(self) -> list[int]:
        """The lanes' trials, in the order of their rows."""
        return [lane.trial for lane in self.lanes]

    def lane(self, trial: int) -> Lane:
        """The lane of a trial."""
        return self.lanes[self._row(trial)]

    def new_module(self) -> nn.Module:
        """A module of the lanes' structure, for a program; its parameters mean nothing."""
        return self.surrogate.make(0).to(self.device)

    def admit(self, trial: int, seed: int, values: Mapping[str, float], state: LaneState | None = None) -> None:
        """Add one lane, new or going on from `state`.

        Raises:
            FusionError: The trial is here already, or `state` belongs to another model or optimizer.
        """
        if trial in self.trials:
            raise FusionError(f"trial {trial} is in this bundle already")
        state = state or self._initial_state(seed)
        row_P = self.layout.pack(state.parameters)
        first = self.optimizer.initial_slots(values)
        slots = {
            name: self.layout.pack(state.optimizer[name]) if name in state.optimizer else torch.full_like(row_P, value)
            for name, value in first.items()
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
        batch_size = round(values.get("batch_size", self.study.batch_size))
        order = self.study.seed if self.study.data_order == "shared" else seed
        stream = SampleStream(order, num_samples(self.data.train[0]), batch_size)
        one = torch.ones(1, dtype=torch.bool, device=self.device)
        row = LaneStack(
            flat=row_P.unsqueeze(0).to(self.device),
            slots={name: slot.unsqueeze(0).to(self.device) for name, slot in slots.items()},
            buffers={k: state.buffers[k].detach().unsqueeze(0).to(self.device) for k in self._stack.buffers},
            finite=one,
            num_finite=one * state.step,
            losses=torch.full((1,), torch.nan, dtype=self.layout.dtype, device=self.device),
        )
        self._install(self._stack.joined(row), [*self.lanes, Lane(trial, seed, dict(values), stream, state.step)])

    def drop(self, trials: Collection[int]) -> None:
        """Remove lanes; the others keep parameters, buffers, optimizer state and step."""
        rows = [row for row, lane in enumerate(self.lanes) if lane.trial not in trials]
        if len(rows) < len(self.lanes):
            self._install(self._stack.select(rows), [self.lanes[row] for row in rows])

    def merge(self, other: LaneHolder) -> None:
        """Take over all lanes of another bundle of the same study and width; it is empty afterwards.

        Raises:
            FusionError: The bundles differ, or both have a trial; neither has changed then.
        """
        if other.layout != self.layout or (other.study, other.num_steps) != (self.study, self.num_steps):
            raise FusionError("got bundles of different studies, widths or budgets, needed two of the same to merge")
        twice = set(self.trials) & set(other.trials)
        if twice:
            raise FusionError(f"trials {sorted(twice)} are in both bundles; drop them from one")
        self._install(self._stack.joined(other._stack), [*self.lanes, *other.lanes])
        other._install(other._empty(), [])

    def state(self, trial: int) -> LaneState:
        """A copy of one lane, for a checkpoint; shares no memory with the bundle."""
        row = self._row(trial)
        return LaneState(
            step=self.lanes[row].step,
            parameters=self.layout.unpack(self._stack.flat[row]),
            buffers={name: tensor[row].clone() for name, tensor in self._stack.buffers.items()},
            optimizer={name: self.layout.unpack(tensor[row]) for name, tensor in self._stack.slots.items()},
        )

    def export(self, trial: int) -> dict[str, Tensor]:
        """One lane as an ordinary `state_dict` of the plain module, on the CPU; shares no memory with the bundle."""
        module = self.surrogate.make(0)
        state = self.state(trial)
        known = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        with torch.no_grad():
            for name, value in {**state.parameters, **state.buffers}.items():
                known[name].copy_(value)
        return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    def state_bytes(self) -> int:
        """Memory of what the lanes keep between steps: parameters, optimizer state, buffers."""
        return self._stack.num_bytes

    def _install(self, stack: LaneStack, lanes: list[Lane]) -> None:
        """Put other rows in place, all at once: whatever can fail has been done before."""
        views = {k: view.detach().requires_grad_() for k, view in self.layout.views(stack.flat).items()}
        gaps = [stack.flat.new_zeros(len(lanes), size) if size else None for size in self.layout.gaps()]
        self._stack, self.lanes, self._parameters, self._gaps, self.torn = stack, lanes, views, gaps, False

    def _empty(self) -> LaneStack:
        flat_FP = torch.zeros(0, self.layout.row_size, dtype=self.layout.dtype, device=self.device)
        return LaneStack(
            flat=flat_FP,
            slots={name: torch.zeros_like(flat_FP) for name in self.optimizer.slot_names},
            buffers={name: tensor.unsqueeze(0)[:0] for name, tensor in _constants(self._template).items()},
            finite=torch.ones(0, dtype=torch.bool, device=self.device),
            num_finite=torch.zeros(0, dtype=torch.long, device=self.device),
            losses=torch.zeros(0, dtype=self.layout.dtype, device=self.device),
        )

    def _initial_state(self, seed: int) -> LaneState:
        module = self.surrogate.make(derive_seed(seed, "init"))
        return LaneState(0, {name: p.detach() for name, p in module.named_parameters()}, _constants(module), {})

    def _row(self, trial: int) -> int:
        for row, lane in enumerate(self.lanes):
            if lane.trial == trial:
                return row
        raise FusionError(f"trial {trial} is not in this bundle; it holds {self.trials}")


def _constants(module: nn.Module) -> dict[str, Tensor]:
    """Buffers and frozen parameters: stacked like parameters, touched by no optimizer."""
    frozen = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
    return {**frozen, **dict(module.named_buffers())}


def _moved(data: Data, device: torch.device) -> Data:
    train, valid = tree_map(lambda tensor: tensor.to(device), (data.train, data.valid))
    return Data(train=train, valid=valid)
