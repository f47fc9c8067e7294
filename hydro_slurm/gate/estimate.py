"""How long the next quantum may take, learned from recent ones, and how much time to leave after it.

Pure arithmetic, no clock and no I/O. Standard library only, Python 3.9.
"""

from __future__ import annotations

import math
from collections import deque

WINDOW = 128
"""Quanta that an estimate looks back on. The 99th percentile of 128 is the second largest: one freak is ignored."""

INITIAL_NS = 2_000_000
"""Assumed of a check site that has not been seen yet."""

CLIP_FACTOR = 4
"""A quantum counts as at most this many times the estimate, so that one that was stopped for long is soon forgotten."""

_SETTLED = 16
_MAX_PATIENCE = 64


def percentile(samples: list[int], share: float) -> int:
    """Nearest-rank percentile of a non-empty list."""
    ordered = sorted(samples)
    return ordered[math.ceil(share * len(ordered)) - 1]


class SiteEstimate:
    """The quanta that begin at one check site."""

    __slots__ = ("_patience", "_refused", "add", "is_settled", "p99_ns", "samples")

    def __init__(self) -> None:
        self.samples: deque[int] = deque(maxlen=WINDOW)
        self.add = self.samples.append
        """The hot path's: no clipping, no new estimate."""
        self.p99_ns = INITIAL_NS
        self.is_settled = False
        self._refused, self._patience = 0, 1

    def add_outlier(self, quantum_ns: int) -> None:
        """Add a quantum that was longer than the estimate."""
        if self.is_settled:
            quantum_ns = min(quantum_ns, CLIP_FACTOR * self.p99_ns)
        self.samples.append(quantum_ns)

    def update(self) -> int:
        """Compute the estimate anew from the samples, and return it."""
        if self.samples:
            self.p99_ns = percentile(list(self.samples), 0.99)
            self.is_settled = len(self.samples) >= _SETTLED
        return self.p99_ns

    def refuse(self, lease_ns: int, margin_ns: int) -> bool:
        """A whole lease was too short for the estimate: nothing runs, so nothing would ever correct it.

        After some such leases the samples that would not have fitted are dropped, and one quantum is dared. If they
        were right, it overruns, they come back, and the patience before the next try is twice as long.

        Returns:
            Whether the estimate has been lowered to fit.
        """
        self._refused += 1
        if self._refused < self._patience:
            return False
        self._refused, self._patience = 0, min(2 * self._patience, _MAX_PATIENCE)
        fitting = [sample for sample in self.samples if sample + margin_ns < lease_ns]
        self.samples.clear()
        self.samples.extend(fitting)
        self.p99_ns = max(0, min(INITIAL_NS, lease_ns - margin_ns - 1))
        self.is_settled = False
        self.update()
        return True

    def confirm(self) -> None:
        """A quantum that began here ended before its deadline."""
        if self._patience > 1 and self.is_settled:
            self._patience //= 2
        self._refused = 0


class Margin:
    """Time left free before the deadline: grows when quanta overrun it, shrinks slowly while none do.

    One overrun weighs as much as 80 clean leases, so it settles where about 1 lease in 80 overruns.
    """

    GROWTH, DECAY, LARGEST = 1.5, 0.995, 10

    def __init__(self, margin_ns: int) -> None:
        self._smallest_ns = margin_ns
        self.value_ns = margin_ns

    def overrun(self) -> None:
        """A quantum ended after its deadline, and not because somebody stopped it."""
        self.value_ns = min(int(self.value_ns * self.GROWTH) + 1, self._smallest_ns * self.LARGEST)

    def clean(self) -> None:
        """A lease was used to its end without an overrun."""
        self.value_ns = max(int(self.value_ns * self.DECAY), self._smallest_ns)
