"""Lanes, and the stacked tensors that hold what changes as they train.

Shape suffixes: F = lanes, P = values per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from hydro_trials.fusion.optimizers import LaneSettings
from hydro_trials.fusion.streams import LanePlace, SampleStream


@dataclass(frozen=True)
class LaneState:
    """Everything that makes a lane go on where it stopped; every tensor is a copy of its own.

    Schedules, sample order and random draws follow from `step` and the lane's seed.
    """

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

    @property
    def place(self) -> LanePlace:
        return LanePlace(self.stream, self.seed, self.step)

    def advance(self, step: int) -> None:
        """Say how many steps the lane has done."""
        self.step = step
        self.settings = LaneSettings(step, self.values)


@dataclass
class LaneStack:
    """Tensors with one row per lane."""

    flat: Tensor
    """Trainable parameters (F, P)."""
    slots: dict[str, Tensor]
    """Optimizer state, each like `flat`."""
    buffers: dict[str, Tensor]
    """Buffers and frozen parameters (F, ...)."""
    finite: Tensor
    """(F,) Whether all losses since the lane began were finite."""
    num_finite: Tensor
    """(F,) Steps up to the last finite loss."""
    losses: Tensor
    """(F,) of the last step."""

    def select(self, rows: Sequence[int]) -> LaneStack:
        """A copy of some rows, in the given order."""
        kept = torch.tensor(rows, dtype=torch.long, device=self.flat.device)
        return self._map(lambda tensor: tensor.index_select(0, kept))

    def joined(self, other: LaneStack) -> LaneStack:
        """These rows, then the other's."""
        mine, others = self._tensors(), other._tensors()
        return self._from(torch.cat([own, theirs]) for own, theirs in zip(mine, others, strict=True))

    @property
    def num_bytes(self) -> int:
        """Memory of all rows."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def _map(self, function: Callable[[Tensor], Tensor]) -> LaneStack:
        return self._from(function(tensor) for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        for part in fields(self):
            value = getattr(self, part.name)
            found += value.values() if isinstance(value, dict) else [value]
        return found

    def _from(self, tensors: Iterable[Tensor]) -> LaneStack:
        rest = iter(tensors)
        values: dict[str, object] = {}
        for part in fields(self):
            old = getattr(self, part.name)
            values[part.name] = {name: next(rest) for name in old} if isinstance(old, dict) else next(rest)
        return LaneStack(**values)  # type: ignore[arg-type]
