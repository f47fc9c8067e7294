"""How many trials one bundle fuses on one slot, and what a step of them costs."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache

from hydro_slurm.errors import ConfigError

KNEE_SHARE = 0.95
"""The knee of a profile is the smallest fusion count with this share of the peak throughput."""


@dataclass(frozen=True, slots=True)
class ThroughputCurve:
    """A profile's throughput: (fusion count, lane steps per second on a device of its own), counts rising."""

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        counts = [count for count, _ in self.points]
        if not counts or counts[0] < 1 or counts != sorted(set(counts)):
            raise ConfigError(f"a throughput curve needs rising fusion counts of 1 or more, got {counts}")
        if not all(rate > 0 for _, rate in self.points):
            raise ConfigError("a throughput curve needs positive lane steps per second at every fusion count")

    def lane_steps_per_s(self, num_lanes: int) -> float:
        """Lane steps per second of a bundle: linear between the points, constant beyond the last.

        Below the first point a step is taken to last as long as at the first.
        """
        points = self.points
        index = bisect_left(points, (num_lanes, 0.0))
        if index == len(points):
            return points[-1][1]
        high_count, high_rate = points[index]
        if index == 0:
            return high_rate * num_lanes / high_count
        low_count, low_rate = points[index - 1]
        return low_rate + (high_rate - low_rate) * (num_lanes - low_count) / (high_count - low_count)

    def knee(self, share: float = KNEE_SHARE) -> int:
        """The smallest profiled fusion count that reaches `share` of the peak throughput."""
        peak = max(rate for _, rate in self.points)
        return next(count for count, rate in self.points if rate >= share * peak)


@dataclass(frozen=True, kw_only=True, slots=True)
class SizingPolicy:
    """Limits on the fusion count, and what fusing brings."""

    max_lanes: int
    """Largest fusion count, from the study's profile or its author."""
    lane_bytes: int = 0
    """Memory that one lane adds, in bytes; 0 while nothing has been measured."""
    memory_share: float = 0.8
    """Part of a slot's free memory that a bundle may plan with."""
    curve: ThroughputCurve | None = None
    """Measured throughput by fusion count; None: a step is taken to last as long as its lanes are many."""

    def __post_init__(self) -> None:
        if self.max_lanes < 1:
            raise ConfigError(f"max_lanes must be at least 1, got {self.max_lanes}")
        if not 0 < self.memory_share <= 1:
            raise ConfigError(f"memory_share must lie in (0, 1], got {self.memory_share}")

    def step_costs(self) -> tuple[float, ...]:
        """Relative duration of a step at 0, 1, … `max_lanes` lanes: never falling, whatever a noisy profile says."""
        return _step_costs(self.curve, self.max_lanes)


def max_fusion_count(free_bytes: int, sizing: SizingPolicy) -> int:
    """Most lanes that a bundle may hold on a slot.

    The profile's knee bounds it: beyond, a lane slows its neighbours by as much as it adds.

    Args:
        free_bytes: Free memory on the slot's device; 0 if it is not known.
        sizing: The limits.

    Returns:
        0 if not even one lane fits, else a count from 1 to `sizing.max_lanes`.
    """
    count = sizing.max_lanes if sizing.curve is None else min(sizing.max_lanes, sizing.curve.knee())
    if sizing.lane_bytes and free_bytes:
        count = min(count, int(free_bytes * sizing.memory_share) // sizing.lane_bytes)
    return max(count, 0)


@lru_cache(maxsize=1024)
def _step_costs(curve: ThroughputCurve | None, max_lanes: int) -> tuple[float, ...]:
    if curve is None:
        return tuple(map(float, range(max_lanes + 1)))
    costs = [0.0]
    for num_lanes in range(1, max_lanes + 1):
        costs.append(max(costs[-1], num_lanes / curve.lane_steps_per_s(num_lanes)))
    return tuple(costs)
