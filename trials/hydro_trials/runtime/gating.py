"""The bundle's view of its gate: one check for every boundary, and what is counted between them."""

from __future__ import annotations

from typing import Protocol

from hydro_slurm.clock import Clock, SystemClock


class LeaveRequested(BaseException):  # not an error, and no `except Exception` of a user may swallow it
    """SIGTERM came: the bundle is to checkpoint and leave."""


Run = tuple[int, int, int]
"""Uninterrupted computing: start_ns, end_ns, num_quanta."""


class StandaloneGate:
    """Never closed: for a bundle in the study's own allocation, and for profiles."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._now = self._clock.monotonic_ns
        self._last_ns = self._start_ns = self._now()
        self._num_quanta = 0
        self._recent_ns: list[int] = []
        self._runs: list[Run] = []
        self.compute_ns = 0

    def check(self) -> None:
        now_ns = self._now()
        self.compute_ns += now_ns - self._last_ns
        self._recent_ns.append(now_ns - self._last_ns)
        if len(self._recent_ns) >= 4096:
            del self._recent_ns[:2048]
        self._last_ns = now_ns
        self._num_quanta += 1

    @property
    def quantum_p99_ns(self) -> int:
        recent_ns = sorted(self._recent_ns)
        return recent_ns[len(recent_ns) * 99 // 100] if recent_ns else 0

    def rest(self, seconds: float) -> None:
        self.cut_run()
        self._clock.sleep(seconds)
        self._last_ns = self._start_ns = self._now()

    def cut_run(self) -> None:
        now_ns = self._now()
        self.compute_ns += now_ns - self._last_ns
        if now_ns > self._start_ns:
            self._runs.append((self._start_ns, now_ns, self._num_quanta))
        self._last_ns = self._start_ns = now_ns
        self._num_quanta = 0

    def take_runs(self) -> list[Run]:
        runs, self._runs = self._runs, []
        return runs

    def note_lanes(self, num_lanes: int) -> None:
        pass

    def close(self) -> None:
        pass


class Gate(Protocol):
    """What a bundle needs to know of a gate."""

    @property
    def compute_ns(self) -> int:
        """Time spent computing so far."""
        ...

    @property
    def quantum_p99_ns(self) -> int:
        """99th percentile of the last quanta."""
        ...

    def check(self) -> None:
        """Return when the next quantum may run."""
        ...

    def rest(self, seconds: float) -> None:
        """Sleep, telling whoever watches that nothing is being computed."""
        ...

    def cut_run(self) -> None:
        """End the run being recorded here and begin another."""
        ...

    def take_runs(self) -> list[Run]:
        """Runs that have ended since the last call."""
        ...

    def note_lanes(self, num_lanes: int) -> None:
        """Tell whoever watches how many lanes there are."""
        ...

    def close(self) -> None:
        """Say that the bundle leaves."""
        ...


class BundleGate:
    """Every boundary goes through `check`; it is the only place where a step may be broken off.

    A signal that arrives while the gate is waited for breaks the wait off; one that arrives while the bundle computes
    takes effect at the next boundary.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._in_check = False
        self._leaving = False
        self.leave_requested = False
        self.cut_run, self.take_runs = gate.cut_run, gate.take_runs
        self.note_lanes, self.close = gate.note_lanes, gate.close

    @property
    def compute_ns(self) -> int:
        return self._gate.compute_ns

    @property
    def quantum_p99_ns(self) -> int:
        return self._gate.quantum_p99_ns

    def check(self) -> None:
        """Return when the next quantum may run.

        Raises:
            GateGoneError: The host has left.
            LeaveRequested: SIGTERM has come.
        """
        if self._leaving:
            return
        if self.leave_requested:
            raise LeaveRequested
        self._in_check = True
        self._gate.check()
        self._in_check = False

    def rest(self, seconds: float) -> None:
        """Sleep for a while; nothing is being computed.

        Raises:
            LeaveRequested: SIGTERM has come.
        """
        if self.leave_requested:
            raise LeaveRequested
        self._gate.rest(seconds)

    def on_signal(self, number: int, frame: object) -> None:
        """Handler of SIGTERM."""
        self.leave_requested = True
        if self._in_check and not self._leaving:
            raise LeaveRequested

    def begin_leaving(self) -> None:
        """From now on no check blocks or raises: what is left to do is short."""
        self._leaving = True
