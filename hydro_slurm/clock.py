"""Time as something that is handed in, so that tests do not wait for it."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What the code needs to know about time."""

    def monotonic_ns(self) -> int:
        """CLOCK_MONOTONIC in nanoseconds: one time base for every process of a node."""
        ...

    def wall_s(self) -> float:
        """Seconds since the epoch, comparable between nodes as far as their clocks agree."""
        ...

    def sleep(self, seconds: float) -> None:
        """Block the calling thread."""
        ...


class SystemClock:
    """The real clock."""

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()

    def wall_s(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class ManualClock:
    """A clock that moves only when it is told to; `sleep` moves it and returns at once."""

    def __init__(self, monotonic_ns: int = 1_000_000_000, wall_s: float = 1_700_000_000.0) -> None:
        self._monotonic_ns, self._wall_s = monotonic_ns, wall_s

    def monotonic_ns(self) -> int:
        return self._monotonic_ns

    def wall_s(self) -> float:
        return self._wall_s

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Move both the monotonic and the wall clock forward."""
        self._monotonic_ns += round(seconds * 1e9)
        self._wall_s += seconds
