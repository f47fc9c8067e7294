"""Choices made from measured points; pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from hydro_slurm.model import ProfilePoint
from hydro_trials.fusion.program import COMPILED


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


def choose_point(points: Sequence[ProfilePoint], lanes: int, quantum_ms: float | None = None) -> ProfilePoint | None:
    """The fastest way at the measured fusion count that is nearest to `lanes`, by their ratio.

    What was compiled counts only at the very fusion count that it was compiled for.

    Args:
        points: Several ways at several fusion counts.
        lanes: The fusion count.
        quantum_ms: Longest quantum; points beyond it are left out, unless all are.
    """
    usable = [p for p in points if p.kind != COMPILED or p.lanes == lanes]
    if quantum_ms is not None:
        usable = [p for p in usable if p.quantum_p99_us <= quantum_ms * 1e3] or usable
    return min(usable, key=lambda p: (abs(math.log(p.lanes / max(1, lanes))), p.lanes, p.step_ms), default=None)


def most_lanes(points: Sequence[ProfilePoint], cap_bytes: int | None, quantum_ms: float | None) -> int | None:
    """The largest measured fusion count that keeps to both limits; None where every measured one does, or none."""
    fitting = {
        p.lanes
        for p in points
        if (cap_bytes is None or p.peak_bytes <= cap_bytes)
        and (quantum_ms is None or p.quantum_p99_us <= quantum_ms * 1e3)
    }
    return None if fitting == {p.lanes for p in points} or not fitting else max(fitting)


def memory_line(points: Sequence[ProfilePoint]) -> int:
    """Bytes that one more lane adds: the largest slope between two points; 0 where there are not two."""
    marks = [(point.lanes, point.peak_bytes) for point in points]
    slopes = [(later[1] - mark[1]) / (later[0] - mark[0]) for mark, later in pairwise(marks)]
    return max(0, round(max(slopes, default=0.0)))
