"""Is the host slowed? A random share of iterations keeps all gates closed; the guard compares the two groups.

Which iterations are control is drawn from a secret that all ranks share, so every rank closes in the same ones, and
nobody outside can arrange to behave in just those.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, insort
from collections import deque
from typing import Optional

from hydro_slurm.model import GuardReport

MIN_CONTROL, MIN_SHARED = 8, 16
"""Fewer iterations than these give no estimate."""


def is_control(secret: bytes, step: int, control_share: float) -> bool:
    """Whether global step `step` is a control iteration: the same answer on every rank that holds `secret`."""
    digest = hashlib.blake2b(step.to_bytes(8, "little"), key=secret, digest_size=8).digest()
    return int.from_bytes(digest, "little") < control_share * 2**64


class Guard:
    """Compares the durations of control and shared iterations, and shuts the slot when the bound is exceeded.

    Each duration is taken relative to the median of the iterations around it, so a machine that gets slower over the
    hours is not mistaken for a slowdown. The interval is that of the difference of two medians, each with the
    standard error of its order statistics: no assumption about the distribution, and cheap.

    Args:
        max_slowdown: Largest tolerated slowdown, as a fraction of the iteration time.
        window: How many iterations of each kind are remembered.
    """

    def __init__(self, *, max_slowdown: float = 0.01, window: int = 600, trend_window: int = 31) -> None:
        if not 0 < max_slowdown < 1:
            raise ValueError(f"max_slowdown must lie between 0 and 1, got {max_slowdown}")
        self.max_slowdown = max_slowdown
        self.shut = False
        self._control: deque[float] = deque(maxlen=window)
        self._shared: deque[float] = deque(maxlen=window)
        self._recent: deque[int] = deque(maxlen=trend_window)
        self._recent_ordered: list[int] = []

    def add(self, duration_ns: int, *, control: bool) -> None:
        """One whole training iteration that ran in the normal mode."""
        if duration_ns <= 0:
            return
        if len(self._recent) == self._recent.maxlen:
            del self._recent_ordered[bisect_left(self._recent_ordered, self._recent[0])]
        self._recent.append(duration_ns)
        insort(self._recent_ordered, duration_ns)
        if len(self._recent) < MIN_CONTROL:
            return
        trend = self._recent_ordered[len(self._recent_ordered) // 2]
        (self._control if control else self._shared).append(math.log(duration_ns / trend))

    def report(self, *, learning: bool) -> GuardReport:
        """The present estimate; shuts the slot for good when even the lower end of the interval is too slow."""
        control, shared = sorted(self._control), sorted(self._shared)
        slowdown: Optional[float] = None
        interval: Optional[tuple[float, ...]] = None
        if len(control) >= MIN_CONTROL and len(shared) >= MIN_SHARED:
            difference = _median(shared) - _median(control)
            error = 1.96 * math.hypot(_median_error(shared), _median_error(control))
            slowdown = math.expm1(difference)
            interval = (math.expm1(difference - error), math.expm1(difference + error))
            self.shut = self.shut or interval[0] > self.max_slowdown
        state = "shut" if self.shut else "learning" if learning else "open"
        return GuardReport(state, slowdown, interval, len(control), len(shared))


def _median(ordered: list[float]) -> float:
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _median_error(ordered: list[float]) -> float:
    """Standard error of the median, from the order statistics that bound its 95 % interval (binomial, normal limit)."""
    count = len(ordered)
    half = 1.96 * math.sqrt(count) / 2
    low = max(0, math.floor(count / 2 - half))
    high = min(count - 1, math.ceil(count / 2 + half))
    return (ordered[high] - ordered[low]) / (2 * 1.96)
