"""How long will this gap last? Learned per schedule and position, from the last dozen times it came.

The order of compute and gaps within an iteration is fixed by the pipeline schedule, so a gap is known by its
*position*: the number of compute slots of this iteration that came before it. Only durations are learned. The
prediction is a low quantile: a gap that turns out longer costs the bundle a little time, one that turns out shorter
costs the host. Pure: no clock, no I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Optional

MIN_GAP_NS = 3_000_000
"""Shorter gaps are of no use: pausing and resuming a bundle takes its share."""


class GapPredictor:
    """Learns gap durations and predicts the next one of the same position.

    Args:
        quantile: Which quantile of the remembered durations is predicted.
        window: How many durations are remembered per position.
        min_samples: A position is predicted after this many.
        min_gap_ns: Predictions below this are 0: the gate stays closed.
        outlier_factor: A gap longer than this many times the upper quartile is not learned (somebody evaluated,
            wrote a checkpoint, or stopped the process), unless it comes `window` times in a row.
    """

    def __init__(
        self,
        *,
        quantile: float = 0.25,
        window: int = 12,
        min_samples: int = 4,
        min_gap_ns: int = MIN_GAP_NS,
        outlier_factor: float = 4.0,
    ) -> None:
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile must lie between 0 and 1, got {quantile}")
        if not 1 <= min_samples <= window:
            raise ValueError(f"min_samples must lie between 1 and the window of {window}, got {min_samples}")
        self.quantile, self.window, self.min_samples = quantile, window, min_samples
        self.min_gap_ns, self.outlier_factor = min_gap_ns, outlier_factor
        self._schedule: Optional[Hashable] = None
        self._positions: dict[int, _Position] = {}

    @property
    def schedule(self) -> Optional[Hashable]:
        """What the learned durations belong to."""
        return self._schedule

    def set_schedule(self, schedule: Hashable) -> bool:
        """Name the schedule that follows; another than before forgets everything. Returns whether it was another."""
        if schedule == self._schedule:
            return False
        self._schedule = schedule
        self._positions.clear()
        return True

    def record(self, position: int, duration_ns: int) -> bool:
        """Learn one gap; returns False for an outlier, which is not learned."""
        known = self._positions.get(position)
        if known is None:
            known = self._positions[position] = _Position(self.window)
        if len(known.durations) >= self.min_samples and duration_ns > self.outlier_factor * max(
            known.upper_quartile, self.min_gap_ns
        ):
            known.outliers_in_a_row += 1
            if known.outliers_in_a_row < self.window:
                return False
            known.durations.clear()
        known.outliers_in_a_row = 0
        known.durations.append(duration_ns)
        ordered = sorted(known.durations)
        known.upper_quartile = _quantile(ordered, 0.75)
        predicted = _quantile(ordered, self.quantile) if len(ordered) >= self.min_samples else 0
        known.predicted = predicted if predicted >= self.min_gap_ns else 0
        return True

    def predict(self, position: int) -> int:
        """Nanoseconds that the gap at `position` will most likely last at least; 0 if unknown or of no use."""
        known = self._positions.get(position)
        return 0 if known is None else known.predicted

    @property
    def num_usable(self) -> int:
        """Gaps per iteration that are predicted to be of use."""
        return sum(known.predicted > 0 for known in list(self._positions.values()))

    def predicted_ns_per_iteration(self) -> int:
        """All that is predicted, summed over one iteration."""
        return sum(known.predicted for known in list(self._positions.values()))

    def usable_durations_ns(self) -> list[int]:
        """The remembered durations of all usable gaps, ascending."""
        usable = [list(known.durations) for known in list(self._positions.values()) if known.predicted > 0]
        return sorted(duration for durations in usable for duration in durations)


def quantiles_ms(durations_ns: list[int]) -> dict[str, float]:
    """p10, p25, p50, p75, p90 of an ascending list, in milliseconds; empty for an empty list."""
    if not durations_ns:
        return {}
    return {f"p{percent}": _quantile(durations_ns, percent / 100) / 1e6 for percent in (10, 25, 50, 75, 90)}


class _Position:
    __slots__ = ("durations", "outliers_in_a_row", "predicted", "upper_quartile")

    def __init__(self, window: int) -> None:
        self.durations: deque[int] = deque(maxlen=window)
        self.outliers_in_a_row = self.predicted = self.upper_quartile = 0


def _quantile(ordered: list[int], quantile: float) -> int:
    """Linear interpolation between the two nearest of an ascending list."""
    place = quantile * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return round(ordered[low] + (ordered[high] - ordered[low]) * (place - low))
