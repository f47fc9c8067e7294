"""The bundle's view of its gate: one check for every boundary, and what is counted between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from hydro_slurm.clock import Clock
from hydro_slurm.gate.bundle_page import BundlePage
from hydro_slurm.gate.free import FreeGate
from hydro_slurm.gate.quanta import QuantumGate, Run
from hydro_slurm.gate.reader import GateReader


class LeaveRequested(BaseException):  # not an error, and no `except Exception` of a user may swallow it
    """SIGTERM came: the bundle is to checkpoint and leave."""


class SlotGate(Protocol):
    """What the two kinds of slots have in common."""

    @property
    def compute_ns(self) -> int:
        """Time spent computing so far."""
        ...

    @property
    def quantum_p99_ns(self) -> int:
        """99th percentile of recent quanta."""
        ...

    def check(self, site: int) -> None:
        """Return when the quantum that begins at this site may run."""
        ...

    def rest(self, seconds: float) -> None:
        """Sleep, telling whoever watches that nothing is being computed."""
        ...

    def take_runs(self) -> list[Run]:
        """Runs that have ended since the last call."""
        ...

    def set_num_lanes(self, num_lanes: int) -> None:
        """Tell whoever watches how many lanes there are."""
        ...

    def begin_leaving(self) -> None:
        """Say that what is computed from now on is the end."""
        ...

    def close(self) -> None:
        """Take leave."""
        ...


class BubbleSlotGate:
    """Behind a host's gate."""

    def __init__(self, directory: Path, bundle: str, clock: Clock) -> None:
        """Attach.

        Raises:
            GateError: There is no gate.
            GateGoneError: Its host has left.
        """
        self._clock = clock
        self._reader = GateReader.attach(directory, clock=clock)
        self._page = BundlePage.create(directory, bundle, clock=clock)
        self._gate = QuantumGate(self._reader, self._page, record_runs=True, clock=clock)
        self._has_rested = False
        self.set_num_lanes = self._gate.set_num_lanes

    @property
    def compute_ns(self) -> int:
        return self._gate.compute_ns

    @property
    def quantum_p99_ns(self) -> int:
        return self._gate.quantum_p99_ns

    def check(self, site: int) -> None:
        if self._has_rested:
            self._gate.wait_until_open()
            self._has_rested = False
        self._gate.check(site)

    def rest(self, seconds: float) -> None:
        if not self._has_rested:
            self._has_rested = True
            self._gate.pause()
        self._clock.sleep(seconds)

    def take_runs(self) -> list[Run]:
        runs, self._gate.runs = self._gate.runs, []
        return runs or []

    def begin_leaving(self) -> None:
        self._gate.begin_leaving()

    def close(self) -> None:
        self._page.close()
        self._reader.close()


class OwnSlotGate:
    """In the study's own allocation: never closed, only measured."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._gate = FreeGate(clock=clock)
        self._rested_ns = 0
        self._run_start_ns, self._run_start_quanta = clock.monotonic_ns(), 0
        self._runs: list[Run] = []
        self.check = self._gate.check
        self.set_num_lanes = self._gate.set_num_lanes

    @property
    def compute_ns(self) -> int:
        return self._gate.compute_ns - self._rested_ns

    @property
    def quantum_p99_ns(self) -> int:
        return self._gate.quantum_p99_ns

    def rest(self, seconds: float) -> None:
        began_ns = self._end_run()
        self._clock.sleep(seconds)
        self._gate.wait_until_open()
        self._run_start_ns = self._clock.monotonic_ns()
        self._rested_ns += self._run_start_ns - began_ns

    def take_runs(self) -> list[Run]:
        self._end_run()
        runs, self._runs = self._runs, []
        return runs

    def begin_leaving(self) -> None:
        """Nobody watches."""

    def close(self) -> None:
        """Nobody watches."""

    def _end_run(self) -> int:
        now_ns, num_quanta = self._clock.monotonic_ns(), self._gate.num_quanta
        if num_quanta > self._run_start_quanta:
            self._runs.append(Run(self._run_start_ns, now_ns, num_quanta - self._run_start_quanta))
        self._run_start_ns, self._run_start_quanta = now_ns, num_quanta
        return now_ns


class BundleGate:
    """Every boundary goes through `check`; it is the only place where a step may be broken off.

    A signal that arrives while the gate is waited for breaks the wait off; one that arrives while the bundle computes
    takes effect at the next boundary.
    """

    def __init__(self, gate: SlotGate) -> None:
        self._gate = gate
        self._check: Callable[[int], None] = gate.check
        self._in_check = False
        self._leaving = False
        self.leave_requested = False
        self.take_runs, self.set_num_lanes, self.close = gate.take_runs, gate.set_num_lanes, gate.close

    @property
    def compute_ns(self) -> int:
        return self._gate.compute_ns

    @property
    def quantum_p99_ns(self) -> int:
        return self._gate.quantum_p99_ns

    def check(self, site: int) -> None:
        """Return when the quantum that begins at this site may run.

        Raises:
            GateGoneError: The host has left.
            LeaveRequested: SIGTERM has come.
        """
        if self._leaving:
            return
        if self.leave_requested:
            raise LeaveRequested
        self._in_check = True
        try:
            self._check(site)
        finally:
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
        self._gate.begin_leaving()
