"""A gate that is always open: for a bundle in the study's own allocation. Standard library only, Python 3.9."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Callable, Optional, Protocol

from hydro_slurm.clock import Clock, SystemClock
from hydro_slurm.gate.estimate import SiteEstimate
from hydro_slurm.gate.quanta import Run

POLL_NS = 50_000_000
"""`poll` is called this often."""


class ComputeGate(Protocol):
    """What a bundle's code sees of its gate: `QuantumGate` or `FreeGate`."""

    poll: Optional[Callable[[], None]]
    overruns: int
    num_quanta: int

    @property
    def compute_ns(self) -> int: ...
    @property
    def quantum_p99_ns(self) -> int: ...
    @property
    def runs(self) -> Optional[list[Run]]: ...
    def check(self, site: int = 0) -> None: ...
    def wait_until_open(self) -> None: ...
    def pause(self) -> None: ...
    def begin_leaving(self) -> None: ...
    def undivided(self) -> contextlib.AbstractContextManager[None]: ...
    def set_num_lanes(self, num_lanes: int) -> None: ...


class FreeGate:
    """Measures like `QuantumGate` and never waits."""

    def __init__(
        self,
        *,
        poll: Optional[Callable[[], None]] = None,
        record_runs: bool = False,
        clock: Optional[Clock] = None,
    ) -> None:
        self.poll = poll
        self.overruns = self.num_quanta = 0
        self._now_ns = time.monotonic_ns if clock is None or isinstance(clock, SystemClock) else clock.monotonic_ns
        self._estimate = SiteEstimate()
        self._last_ns = self._start_ns = self._now_ns()
        self._next_poll_ns = self._start_ns
        self._records_runs = record_runs

    @property
    def compute_ns(self) -> int:
        """Time since the start."""
        return self._now_ns() - self._start_ns

    @property
    def quantum_p99_ns(self) -> int:
        """99th percentile of recent quanta, all sites together."""
        return self._estimate.update()

    @property
    def runs(self) -> Optional[list[Run]]:
        """One run, the whole time."""
        return [Run(self._start_ns, self._last_ns, self.num_quanta)] if self._records_runs else None

    def check(self, site: int = 0) -> None:
        """End one quantum and begin the next."""
        now = self._now_ns()
        self.num_quanta += 1
        self._estimate.add(now - self._last_ns)
        self._last_ns = now
        if now >= self._next_poll_ns:
            self._next_poll_ns = now + POLL_NS
            if self.poll is not None:
                self.poll()
                self._last_ns = self._now_ns()

    def wait_until_open(self) -> None:
        """The time since the last check was no quantum."""
        self._last_ns = self._now_ns()

    def pause(self) -> None:
        """Nobody waits for it."""

    def begin_leaving(self) -> None:
        """Nobody waits for it."""

    @contextlib.contextmanager
    def undivided(self) -> Iterator[None]:
        """Around work without checks: here nobody minds."""
        yield
        self.wait_until_open()

    def set_num_lanes(self, num_lanes: int) -> None:
        """Nobody is told."""
