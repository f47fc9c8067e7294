"""Choices made from measured points; pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from hydro_slurm.model import ProfilePoint


class Rated(Protocol):
    """A fusion count with its throughput."""

    @property
    def lanes(self) -> int: ...
    @property
    def lane_steps_per_s(self) -> float: ...


KNEE_SHARE = 0.95
"""Share of the best throughput that the knee must reach."""


def knee(points: Sequence[Rated]) -> int:
    """The smallest fusion count with at least 95 % of the best throughput; 0 of no points."""
    best = max((point.lane_steps_per_s for point in points), default=0.0)
    return min((p.lanes for p in points if p.lane_steps_per_s >= KNEE_SHARE * best), default=0)


def choose_point(points: Sequence[ProfilePoint], lanes: int) -> ProfilePoint | None:
    """The measured point that is nearest to a fusion count, by their ratio."""
    return min(points, key=lambda p: (abs(math.log(p.lanes / max(1, lanes))), p.lanes), default=None)


def memory_line(points: Sequence[ProfilePoint], base_bytes: int) -> int:
    """Bytes that one more lane adds: the largest slope between two points; above the base, where there is one only."""
    marks = [(point.lanes, point.peak_bytes) for point in points]
    slopes = [(later[1] - mark[1]) / (later[0] - mark[0]) for mark, later in pairwise(marks)]
    if not slopes:
        slopes = [(peak - base_bytes) / lanes for lanes, peak in marks]
    return max(0, round(max(slopes, default=0.0)))
