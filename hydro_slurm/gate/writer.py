"""The host's side of a gate: its only writer.

No method blocks, waits or takes a lock. Each costs a few microseconds, most of it system calls: the page is written by
`pwrite`, because a store to a mapping whose file somebody has truncated would kill the training job by SIGBUS.
Standard library only, Python 3.9.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import Optional

from hydro_slurm.clock import Clock, SystemClock
from hydro_slurm.errors import GateError
from hydro_slurm.gate.futex import WAKE_ANY, Futex, map_page, unmap_page
from hydro_slurm.gate.layout import (
    BUNDLES_NAME,
    CLOSED,
    EPOCH_MASK,
    GATE_MAGIC,
    GONE,
    HEAD,
    HEARTBEAT,
    HEARTBEAT_OFFSET,
    LEASE,
    OPEN,
    PAGE_BYTES,
    PAGE_NAME,
    RECORD_OFFSET,
    STATE_MASK,
    WAKE_CLOSED,
    WAKE_OPEN,
    WORD,
    WORD_AND_HEARTBEAT,
    WORD_OFFSET,
    head_bytes,
    require_little_endian,
    word_of,
)
from hydro_slurm.gate.page_file import create_page, make_directory, names_this
from hydro_slurm.gate.process import is_alive, start_ticks
from hydro_slurm.gate.seqlock import SequencedWriter

MAX_LEASE_NS = 60_000_000_000
"""Longer leases are cut to this."""


class GateWriter:
    """Opens and closes one slot. Made by `create`; `heartbeat` may be called from any thread, the rest from one."""

    def __init__(self, directory: Path, descriptor: int, *, stage: int, num_stages: int, clock: Clock) -> None:
        self.directory = directory
        self._path = directory / PAGE_NAME
        self._descriptor = descriptor
        self._now_ns = clock.monotonic_ns
        self._stage, self._num_stages = stage, num_stages
        self._pid, self._start_ticks = os.getpid(), start_ticks(os.getpid())
        self._epoch, self._state = 0, CLOSED
        self._opened_at_ns = self._deadline_ns = self._iteration = self._free_bytes = 0
        self._record = SequencedWriter(descriptor)
        self._address = map_page(descriptor, PAGE_BYTES)
        self._futex = Futex(self._address + WORD_OFFSET, lambda: 0)
        self._left = False
        self._publish_lease()
        self._publish_word()

    @classmethod
    def create(
        cls,
        directory: Path,
        *,
        stage: int,
        num_stages: int,
        clock: Optional[Clock] = None,
        bundles_mode: int = 0o755,
    ) -> GateWriter:
        """Make a slot's gate, closed, in place of one that an earlier host left behind.

        Args:
            directory: Where `page` and `bundles/` shall lie (see `model.gate_dir`).
            stage: Pipeline stage of this host rank.
            num_stages: Number of pipeline stages.
            clock: Time, for tests.
            bundles_mode: Mode of `bundles/`; partition mode hands a sticky one to everybody.

        Raises:
            GateError: The directory cannot be made or is not safe, or another live host has this slot.
        """
        require_little_endian()
        directory = Path(directory)
        make_directory(directory)
        _retire(directory / PAGE_NAME)
        try:
            bundles = directory / BUNDLES_NAME
            bundles.mkdir(exist_ok=True)
            bundles.chmod(bundles_mode)
            descriptor = create_page(directory / PAGE_NAME, GATE_MAGIC, b"")
        except OSError as error:
            raise GateError(f"cannot create the gate {directory / PAGE_NAME}: {error.strerror}") from None
        return cls(directory, descriptor, stage=stage, num_stages=num_stages, clock=clock or SystemClock())

    def open(self, deadline_ns: int, *, iteration: int = 0, free_bytes: int = 0) -> None:
        """Lease the slot until `deadline_ns` (CLOCK_MONOTONIC). A deadline that has passed closes the gate."""
        now = self._now_ns()
        if deadline_ns <= now:
            self.close()
            return
        self._iteration, self._free_bytes = iteration, max(0, free_bytes)
        self._opened_at_ns, self._deadline_ns = now, min(deadline_ns, now + MAX_LEASE_NS)
        self._epoch = (self._epoch + 1) & EPOCH_MASK
        self._publish_lease()
        self._state = OPEN
        self._publish_word()
        self._futex.wake(WAKE_OPEN)

    def close(self) -> None:
        """Take the slot back: bundles pause at their next check."""
        self._state = CLOSED
        self._publish_word()
        self._futex.wake(WAKE_CLOSED)

    def bump_epoch(self) -> None:
        """Close, and make everything that was said under the former epoch void."""
        self._epoch = (self._epoch + 1) & EPOCH_MASK
        self.close()

    def heartbeat(self, iteration: Optional[int] = None) -> None:
        """Say that the host lives. Needed where it neither opens nor closes for seconds.

        Without an iteration it may be called from any thread: it writes nothing but the heartbeat.
        """
        if iteration is not None and iteration != self._iteration:
            self._iteration = iteration
            self._publish_lease()
        os.pwrite(self._descriptor, HEARTBEAT.pack(self._now_ns()), HEARTBEAT_OFFSET)

    def leave(self) -> None:
        """End the slot for good: bundles save their work and go. May be called twice.

        Does nothing in a child that the host has forked: the slot is its parent's.
        """
        if self._left or os.getpid() != self._pid:
            return
        self._left = True
        self._state = GONE
        self._publish_word()
        self._futex.wake(WAKE_ANY)
        with contextlib.suppress(OSError):
            if names_this(self._path, self._descriptor):
                self._path.unlink()
            (self.directory / BUNDLES_NAME).rmdir()
            self.directory.rmdir()

    @property
    def word(self) -> int:
        """The word as last written."""
        return word_of(self._epoch, self._state)

    def _publish_lease(self) -> None:
        self._record.write(
            LEASE.pack(
                word_of(self._epoch, OPEN),
                0,
                self._opened_at_ns,
                self._deadline_ns,
                self._deadline_ns - self._opened_at_ns,
                self._free_bytes,
                self._iteration,
                self._stage,
                self._num_stages,
                self._pid,
                0,
                self._start_ticks,
            )
        )

    def _publish_word(self) -> None:
        state = GONE if self._left else self._state
        word = WORD_AND_HEARTBEAT.pack(word_of(self._epoch, state), 0, self._now_ns())
        os.pwrite(self._descriptor, word, WORD_OFFSET)

    def __enter__(self) -> GateWriter:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.leave()

    def __del__(self) -> None:
        # Not in `leave`: a heartbeat of another thread could then write into whatever file gets the number next.
        if self._address:
            unmap_page(self._address, PAGE_BYTES)
            self._address = 0
            os.close(self._descriptor)


def _retire(path: Path) -> None:
    """Send away who still reads an earlier host's page; refuse if that host lives."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError as error:
        raise GateError(f"cannot replace the gate {path}: {error.strerror}; remove it") from None
    try:
        page = os.pread(descriptor, RECORD_OFFSET + LEASE.size, 0)
        if len(page) != RECORD_OFFSET + LEASE.size or page[: HEAD.size] != head_bytes(GATE_MAGIC):
            return
        word = WORD.unpack_from(page, WORD_OFFSET)[0]
        pid, ticks = LEASE.unpack_from(page, RECORD_OFFSET)[9:12:2]
        if word & STATE_MASK != GONE and pid != os.getpid() and is_alive(pid, ticks):
            raise GateError(f"the gate {path} belongs to live process {pid}; each slot has one host rank")
        os.pwrite(descriptor, WORD.pack(word & ~STATE_MASK | GONE), WORD_OFFSET)
        address = map_page(descriptor, PAGE_BYTES)
        Futex(address + WORD_OFFSET, lambda: 0).wake(WAKE_ANY)
        unmap_page(address, PAGE_BYTES)
    finally:
        os.close(descriptor)
