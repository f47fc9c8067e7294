"""`python -m hydro_slurm.gate.supervisor --gate-dir D --bundle ID -- COMMAND…`: the parent of a bundle.

It takes the core away from a bundle that does not pause by itself, passes signals on, and sees to it that nothing
outlives it. A single thread; it sleeps on the gate's word and costs some ten microseconds per lease.

When the gate closes, a bundle that works in quanta gets max(5 ms, 3 quanta) to say PAUSED on its page; time during
which the host has the core does not count, because it cannot reach its next check then. If it does not say so, its
whole process tree is stopped by SIGSTOP until the gate opens again, and that is a strike: the third ends it, exit
status 75. A bundle that has no page yet (it is starting) or says UNDIVIDED (a checkpoint) is stopped at the deadline
without a strike, for two minutes of its running time. Standard library only, Python 3.9.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from hydro_slurm.errors import GateError, GateGoneError, HydroError
from hydro_slurm.gate.bundle_page import BundlePage, BundlePageReader, BundleSnapshot
from hydro_slurm.gate.layout import LEAVING, PAUSED, STATE_BITS, UNDIVIDED, WAKE_CLOSED, WAKE_GONE, WAKE_OPEN
from hydro_slurm.gate.process import RunTime, start_ticks
from hydro_slurm.gate.process_tree import ProcessTree, adopt_orphans, die_with_parent
from hydro_slurm.gate.reader import SLICE_S, WORD_INDEX, GateReader

EXIT_STRIKES, EXIT_NO_GATE = 75, 69
MAX_STRIKES = 3
FORGIVEN_AFTER = 1000
"""Leases honoured in a row that take one strike away."""
GRACE_S, UNDIVIDED_S = 20.0, 120.0
MIN_PATIENCE_NS, MAX_PATIENCE_NS = 5_000_000, 100_000_000
LEAD_NS = 200_000
"""The supervisor looks this long before the deadline whether the bundle has paused: while the device is still its."""
LONG_LEASE_NS = 250_000_000
"""Only in longer leases is it woken when the host closes early: in shorter ones it looks soon enough by itself, and
would take the host's core at the moment when the host wants it."""

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Supervisor:
    """Runs one command behind one gate.

    Args:
        reader: The gate; None supervises without one.
        gate_directory: Where the bundle's page will be.
        bundle: Its name.
        grace_s: How long the bundle may take to leave, when the gate is gone or it was told to end.
        undivided_s: Running time that it may spend without checks.
    """

    def __init__(
        self,
        reader: Optional[GateReader],
        gate_directory: Optional[Path],
        bundle: str,
        *,
        grace_s: float = GRACE_S,
        undivided_s: float = UNDIVIDED_S,
    ) -> None:
        self._reader, self._gate_directory, self._bundle = reader, gate_directory, bundle
        self._grace_ns, self._undivided_ns = int(grace_s * 1e9), int(undivided_s * 1e9)
        self._page: Optional[BundlePageReader] = None
        self._said: Optional[BundleSnapshot] = None
        self._own_ticks = start_ticks(os.getpid())
        self._child, self._tree = 0, ProcessTree()
        self._status: Optional[int] = None
        self._leave_by_ns: Optional[int] = None
        self._is_stopped = self._has_taken_leave = False
        self._resumed_ns = 0
        self._undivided_used_ns = 0
        self._closed_epoch = self._honoured_epoch = -1
        self._run_time: Optional[RunTime] = None
        self._strikes = self._num_honoured = 0
        self._pending: list[int] = []
        """Signals that wait for being passed on: not in their handler, which may interrupt the stopping of the tree."""
        self._wakeup_read, self._wakeup_write = -1, -1

    def run(self, command: Sequence[str], *, nice: int = 0) -> int:
        """Run the command to its end; the exit status to pass on (128 + n for a signal)."""
        adopt_orphans()
        self._watch_signals()
        self._child = _start(command, nice)
        self._tree = ProcessTree(self._child)
        self._resumed_ns = time.monotonic_ns()
        try:
            while not self._reap():
                self._turn()
        finally:
            self._tree.kill()
        assert self._status is not None
        return self._status

    def _turn(self) -> None:
        """Look once, act, and sleep until something may have changed."""
        now = time.monotonic_ns()
        while self._pending:
            self._pass_on(self._pending.pop(0), now)
        if self._leave_by_ns is not None:
            if now >= self._leave_by_ns:
                self._tree.kill()
            self._idle(max(0.02, (self._leave_by_ns - now) / 1e9))
        elif self._reader is None:
            self._idle(60.0)
        else:
            self._enforce(self._reader, now)

    def _enforce(self, reader: GateReader, now: int) -> None:
        word = reader.words[WORD_INDEX]
        state = reader.look()
        if state == "gone":
            self._say(f"{reader.gone_reason}; it has {self._grace_ns / 1e9:g} s to leave")
            self._begin_leaving(now)
            return
        left_ns = reader.until_ns - now
        if state == "open" and left_ns > LEAD_NS:
            self._let_run(now)
            bits = WAKE_GONE
            if left_ns > LONG_LEASE_NS or not self._works_in_quanta(self._read_page()):
                bits |= WAKE_CLOSED
            reader.sleep(word, (left_ns - LEAD_NS) / 1e9, bits)
            return
        epoch = word >> STATE_BITS
        if self._closed_epoch != epoch:
            self._closed_epoch, self._run_time = epoch, None
        due_ns = self._due_ns(epoch, now)
        if due_ns > now:
            reader.sleep(word, (due_ns - now) / 1e9, WAKE_OPEN | WAKE_GONE)

    def _due_ns(self, epoch: int, now: int) -> int:
        """The gate is closed, or about to: when to look next. Stops the tree where its time is up."""
        later_ns = now + int(SLICE_S * 1e9)
        if self._is_stopped:
            return later_ns
        page = self._read_page()
        if self._has_taken_leave or (page is not None and page.state == LEAVING):
            self._begin_leaving(now)
            return now
        if page is not None and page.state == PAUSED:
            self._honour(epoch)
            return later_ns
        if not self._works_in_quanta(page):
            self._undivided_used_ns += now - self._resumed_ns
            self._stop()
            return later_ns
        if self._run_time is None:
            self._run_time = RunTime(self._computing_pid(page))
        quantum_ns = page.quantum_p99_ns if page is not None else 0
        patience_ns = min(max(MIN_PATIENCE_NS, 3 * quantum_ns), MAX_PATIENCE_NS)
        left_ns = patience_ns - self._run_time.elapsed_ns()
        if left_ns > 0:
            return now + left_ns
        self._strikes += 1
        self._num_honoured = 0
        self._say(f"did not pause within {patience_ns / 1e6:g} ms: strike {self._strikes} of {MAX_STRIKES}")
        if self._strikes >= MAX_STRIKES:
            self._tree.kill()
            self._status = EXIT_STRIKES
            return now
        self._stop()
        return later_ns

    def _computing_pid(self, page: Optional[BundleSnapshot]) -> int:
        """The process that owns the page, where it is one of ours; else the command itself."""
        if page is not None:
            with contextlib.suppress(OSError, OverflowError):
                if os.getsid(page.pid) == self._child:
                    return page.pid
        return self._child

    def _works_in_quanta(self, page: Optional[BundleSnapshot]) -> bool:
        """Whether it may be expected to pause by itself."""
        if page is not None and page.state != UNDIVIDED:
            self._undivided_used_ns, self._resumed_ns = 0, time.monotonic_ns()
            return True
        return self._undivided_used_ns > self._undivided_ns

    def _honour(self, epoch: int) -> None:
        if epoch == self._honoured_epoch:
            return
        self._honoured_epoch = epoch
        self._num_honoured += 1
        if self._num_honoured >= FORGIVEN_AFTER:
            self._num_honoured = 0
            self._strikes = max(0, self._strikes - 1)

    def _stop(self) -> None:
        self._is_stopped = True
        self._tree.stop()

    def _let_run(self, now: int) -> None:
        if self._is_stopped:
            self._is_stopped = False
            self._resumed_ns = now
            self._tree.resume()

    def _begin_leaving(self, now: int) -> None:
        """From here on the gate is not enforced: saving the work must not take longer than it has to."""
        if self._leave_by_ns is None:
            self._leave_by_ns = now + self._grace_ns
        self._let_run(now)

    def _read_page(self) -> Optional[BundleSnapshot]:
        """The bundle's page; None where there is none, or only one that an earlier process left."""
        assert self._gate_directory is not None
        try:
            if self._page is None:
                self._page = BundlePage.attach(self._gate_directory, self._bundle)
            self._said = self._page.snapshot() or self._said
        except GateError as error:
            if isinstance(error, GateGoneError) and self._page is not None:
                self._page.close()
                # It takes its page away as the last thing before its end (and has the grace time for that).
                self._has_taken_leave = self._said is not None and self._said.start_ticks >= self._own_ticks
            self._page = self._said = None
        return self._said if self._said is not None and self._said.start_ticks >= self._own_ticks else None

    def _reap(self) -> bool:
        """Collect whoever has ended; whether the command has."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                if pid == self._child and self._status is None:
                    code = os.waitstatus_to_exitcode(status)
                    self._status = code if code >= 0 else 128 - code
                    self._tree.leader = None
        return self._status is not None

    def _watch_signals(self) -> None:
        self._wakeup_read, self._wakeup_write = os.pipe()
        os.set_blocking(self._wakeup_read, False)
        os.set_blocking(self._wakeup_write, False)
        signal.set_wakeup_fd(self._wakeup_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        for number in FORWARDED:
            signal.signal(number, lambda number, _frame: self._pending.append(number))

    def _pass_on(self, number: int, now: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child, number)
        if number in ENDING:
            # Continues it too: a handled signal stays pending in a stopped process.
            self._begin_leaving(now)

    def _idle(self, seconds: float) -> None:
        """Sleep until a signal comes."""
        select.select([self._wakeup_read], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wakeup_read, 4096)

    def _say(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        sys.stderr.write(f"{stamp} hydro-supervisor: bundle={self._bundle} {text}\n")


def _start(command: Sequence[str], nice: int) -> int:
    """Fork and exec; the child leads a session of its own and dies with this process."""
    parent = os.getpid()
    child = os.fork()
    if child:
        if nice > 0:
            # Between host and bundle: it must get the core from the one and not from the other.
            os.nice(nice // 2)
        return child
    try:
        die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(137)
        os.setsid()
        for number in (*FORWARDED, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.nice(nice)
        os.execvp(command[0], list(command))
    except OSError as error:
        sys.stderr.write(f"hydro-supervisor: cannot run {command[0]}: {error.strerror}\n")
        sys.stderr.flush()
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="hydro_slurm.gate.supervisor", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--gate-dir", type=Path, help="the slot's gate; without it the command is only supervised")
    parser.add_argument("--bundle", required=True, help="the bundle's name")
    parser.add_argument("--nice", type=int, default=0, help="niceness added to the command's (default 0)")
    parser.add_argument("--grace-s", type=float, default=GRACE_S, help="time to leave (default %(default)g)")
    parser.add_argument(
        "--undivided-s",
        type=float,
        default=UNDIVIDED_S,
        help="running time without checks that costs no strike (default %(default)g)",
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="what to run, with its arguments, after --")
    options = parser.parse_args(arguments)
    die_with_parent(signal.SIGTERM)
    try:
        reader = GateReader.attach(options.gate_dir) if options.gate_dir is not None else None
    except HydroError as error:
        sys.stderr.write(f"hydro-supervisor: {error}\n")
        return EXIT_NO_GATE
    supervisor = Supervisor(
        reader, options.gate_dir, options.bundle, grace_s=options.grace_s, undivided_s=options.undivided_s
    )
    return supervisor.run(options.command, nice=options.nice)


if __name__ == "__main__":
    sys.exit(main())
