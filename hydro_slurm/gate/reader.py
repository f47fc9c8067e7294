"""A gate as everybody but its host sees it: read-only, and never trusted.

Whatever happens to the page (deleted, shrunk, overwritten with noise, its host killed), the reader says "closed" or
"gone" and does not crash. The hot path, `may_run`, loads one word from a mapping and compares two numbers; the lease
behind the word is read once per lease. Standard library only, Python 3.9.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union, overload

from hydro_slurm.clock import Clock, SystemClock
from hydro_slurm.errors import GateError, GateGoneError
from hydro_slurm.gate.futex import WAKE_ANY, Futex, map_page, unmap_page
from hydro_slurm.gate.layout import (
    CLOSED,
    GATE_MAGIC,
    GONE,
    HEAD,
    HEARTBEAT,
    HEARTBEAT_OFFSET,
    LEASE,
    OPEN,
    PAGE_BYTES,
    PAGE_NAME,
    STATE_BITS,
    STATE_MASK,
    STATE_NAMES,
    WAKE_GONE,
    WAKE_OPEN,
    WORD,
    WORD_OFFSET,
    head_bytes,
    require_little_endian,
)
from hydro_slurm.gate.process import is_alive
from hydro_slurm.gate.seqlock import read_page
from hydro_slurm.gate.sigbus import guard, release

STALE_S = 5.0
"""A heartbeat older than this closes the gate."""
GONE_S = 120.0
"""A heartbeat older than this ends the slot, even if the host's process is still there."""
SLICE_S = 0.25
"""A blocked reader looks this often whether the page still is one."""

WORD_INDEX = WORD_OFFSET // 4
_FUTURE_NS = 1_000_000_000
_LOOK_ATTEMPTS = 4
_NO_WORD = -1
_HEAD = head_bytes(GATE_MAGIC)


@dataclass(frozen=True)
class GateSnapshot:
    """One consistent view of the page. Times are CLOCK_MONOTONIC nanoseconds."""

    word: int
    state: str
    """closed, open or gone, as the reader judges it: an expired lease or a stale heartbeat is closed."""
    opened_at_ns: int
    deadline_ns: int
    open_for_ns: int
    heartbeat_ns: int
    free_bytes: int
    iteration: int
    stage: int
    num_stages: int
    pid: int
    start_ticks: int

    @property
    def epoch(self) -> int:
        return self.word >> STATE_BITS


class _FileWords(Sequence[int]):
    """The page's 32-bit words through the file, for machines where the mapping cannot be guarded."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: Union[int, slice]) -> Union[int, Sequence[int]]:
        assert isinstance(index, int)
        data = os.pread(self._descriptor, 4, 4 * index)
        return WORD.unpack(data)[0] if len(data) == 4 else CLOSED

    def __len__(self) -> int:
        return PAGE_BYTES // 4


class GateReader:
    """Reads one gate. Made by `attach`; for one thread.

    `words`, `open_word` and `until_ns` are what `QuantumGate` compares in line: while `words[WORD_INDEX]` is
    `open_word`, the slot may be used until `until_ns`.
    """

    def __init__(self, path: Path, descriptor: int, *, clock: Clock, stale_s: float, gone_s: float) -> None:
        self.path = path
        self.open_word = _NO_WORD
        self.until_ns = 0
        self._clock = clock
        self._is_real_time = isinstance(clock, SystemClock)
        self.now_ns = time.monotonic_ns if self._is_real_time else clock.monotonic_ns
        self._stale_ns, self._gone_ns = int(stale_s * 1e9), int(gone_s * 1e9)
        self._descriptor = descriptor
        self._gone_reason = ""
        self._last: Optional[GateSnapshot] = None
        self._address = map_page(descriptor, PAGE_BYTES)
        self.words: Sequence[int]
        if guard(self._address, PAGE_BYTES):
            page = (ctypes.c_uint32 * (PAGE_BYTES // 4)).from_address(self._address)
            self.words = memoryview(page).cast("B").cast("I")
        else:
            self.words = _FileWords(descriptor)
        self._futex = Futex(self._address + WORD_OFFSET, lambda: self.words[WORD_INDEX])

    @classmethod
    def attach(
        cls, directory: Path, *, clock: Optional[Clock] = None, stale_s: float = STALE_S, gone_s: float = GONE_S
    ) -> GateReader:
        """Attach to the gate in `directory`.

        Raises:
            GateError: There is no page, or it may not be read.
            GateGoneError: There is one, but its host has left or it is not a gate's page.
        """
        require_little_endian()
        path = Path(directory) / PAGE_NAME
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            raise GateError(f"no gate at {path}; does its host run, on this node?") from None
        except OSError as error:
            raise GateError(f"cannot read the gate {path}: {error.strerror}") from None
        try:
            reader = cls(path, descriptor, clock=clock or SystemClock(), stale_s=stale_s, gone_s=gone_s)
        except OSError as error:
            os.close(descriptor)
            raise GateGoneError(f"{path} is not a gate's page: {error.strerror}") from None
        if reader.look() == "gone":
            reason = reader.gone_reason
            reader.close()
            raise GateGoneError(reason)
        return reader

    def may_run(self, need_ns: int) -> bool:
        """Whether something that takes `need_ns` may start now: it would end before the deadline."""
        if self.words[WORD_INDEX] == self.open_word and self.now_ns() + need_ns < self.until_ns:
            return True
        return self.look() == "open" and self.now_ns() + need_ns < self.until_ns

    @property
    def gone_reason(self) -> str:
        """Why the gate is gone; empty while it is not."""
        return self._gone_reason

    def look(self) -> str:
        """Read the whole page again: "closed", "open" or "gone" (which stays)."""
        try:
            found = self._examine()
        except GateGoneError:
            return "gone"
        return found.state if found is not None else "closed"

    def state(self) -> str:
        """What `look` says: "closed", "open" or "gone"."""
        return self.look()

    def snapshot(self) -> GateSnapshot:
        """One consistent view of the whole page.

        Raises:
            GateGoneError: The page is no longer one.
            GateError: Its writer did not finish writing (it may have been stopped in mid-write).
        """
        found = self._examine()
        if found is None:
            raise GateError(f"{self.path} is being written all the time; try again")
        return found

    def wait_open(self, need_ns: int, timeout_s: float) -> str:
        """Sleep until `may_run(need_ns)`: "open", "gone", or "timeout". Costs no CPU time while it waits."""
        end_ns = self.now_ns() + int(timeout_s * 1e9)
        while True:
            word = self.words[WORD_INDEX]
            state = self.look()
            now = self.now_ns()
            if state == "gone":
                return "gone"
            if state == "open" and now + need_ns < self.until_ns:
                return "open"
            if now >= end_ns:
                return "timeout"
            self.sleep(word, (end_ns - now) / 1e9, WAKE_OPEN | WAKE_GONE)

    def wait_change(self, word: int, timeout_s: float, bits: int = WAKE_ANY) -> str:
        """Sleep until the page's word is no longer `word`; what `look` then says.

        Returns after `timeout_s` at the latest, and early after a signal.

        Args:
            word: As it stood in `snapshot().word` or `words[WORD_INDEX]`.
            timeout_s: Longest sleep.
            bits: Which changes to be woken for; the others are seen late.
        """
        end_ns = self.now_ns() + int(timeout_s * 1e9)
        while self.words[WORD_INDEX] == word and self.look() != "gone":
            left_ns = end_ns - self.now_ns()
            if left_ns <= 0 or self.sleep(word, left_ns / 1e9, bits):
                break
        return self.look()

    def close(self) -> None:
        """Unmap the page. The reader says "gone" from now on."""
        self._end(f"the reader of {self.path} is closed")
        if self._address:
            self.words = (GONE,) * (WORD_INDEX + 1)
            release(self._address)
            unmap_page(self._address, PAGE_BYTES)
            self._address = 0
            os.close(self._descriptor)

    def sleep(self, word: int, seconds: float, bits: int) -> bool:
        """Sleep while the page's word is `word`, for `SLICE_S` at most; whether something woke it (or a signal came).

        `bits`: which changes to be woken for (`futex.WAKE_OPEN` and so on); others are seen at the end of the slice.
        """
        wanted_s = min(seconds, SLICE_S)
        if not self._is_real_time:
            self._clock.sleep(wanted_s)
            return False
        began_ns = self.now_ns()
        if not self._futex.wait(word, wanted_s, bits):
            self._end(f"{self.path} has shrunk or was unmapped")
        if self.now_ns() - began_ns < wanted_s * 1e9:
            return True
        last = self._last
        if last is not None and not is_alive(last.pid, last.start_ticks):
            self._end(f"the host of {self.path}, process {last.pid}, has ended")
        return False

    def _examine(self) -> Optional[GateSnapshot]:
        """Look until the page makes sense; None where it did not for some attempts, which counts as closed.

        Several attempts, because word and heartbeat may show bytes of two values for some nanoseconds.
        """
        if self._gone_reason:
            raise GateGoneError(self._gone_reason)
        self.open_word, self.until_ns = _NO_WORD, 0
        try:
            for attempts_left in reversed(range(_LOOK_ATTEMPTS)):
                word, heartbeat_ns, lease = self._read_page()
                age_ns = self.now_ns() - heartbeat_ns
                if age_ns < -_FUTURE_NS:
                    if not attempts_left:
                        raise GateGoneError(f"{self.path} holds noise: its heartbeat lies in the future")
                elif age_ns > self._gone_ns:
                    raise GateGoneError(f"the host of {self.path} has given no sign of life for {age_ns / 1e9:.0f} s")
                elif lease is not None and (word & STATE_MASK != OPEN or lease[0] == word):
                    self._last = self._judge(word, heartbeat_ns, age_ns > self._stale_ns, lease)
                    return self._last
        except GateGoneError as error:
            self._end(str(error))
            raise
        return None

    def _read_page(self) -> tuple[int, int, Optional[tuple[int, ...]]]:
        """Word, heartbeat, and the record where it was not being written."""
        try:
            page, record = read_page(self._descriptor, LEASE.size)
        except (OSError, EOFError) as error:
            raise GateGoneError(f"{self.path} is no longer a gate's page: {error}") from None
        if page[: HEAD.size] != _HEAD:
            raise GateGoneError(f"{self.path} is not a gate's page of this version of hydro_slurm")
        word = WORD.unpack_from(page, WORD_OFFSET)[0]
        if word & STATE_MASK not in (CLOSED, OPEN):
            raise GateGoneError(f"the host of {self.path} has left")
        return word, HEARTBEAT.unpack_from(page, HEARTBEAT_OFFSET)[0], None if record is None else LEASE.unpack(record)

    def _judge(self, word: int, heartbeat_ns: int, is_stale: bool, lease: tuple[int, ...]) -> GateSnapshot:
        _, _, opened_at_ns, deadline_ns, open_for_ns, free_bytes = lease[:6]
        iteration, stage, num_stages, pid, _, ticks = lease[6:]
        until_ns = min(deadline_ns, heartbeat_ns + self._stale_ns)
        if is_stale and not is_alive(pid, ticks):
            raise GateGoneError(f"the host of {self.path}, process {pid}, has ended")
        state = CLOSED
        if word & STATE_MASK == OPEN and self.now_ns() < until_ns:
            state = OPEN
            self.open_word, self.until_ns = word, until_ns
        elif os.fstat(self._descriptor).st_nlink == 0:
            # Not asked in an open gate, where every microsecond counts: leases end soon.
            raise GateGoneError(f"{self.path} has been deleted")
        return GateSnapshot(
            word,
            STATE_NAMES[state],
            opened_at_ns,
            deadline_ns,
            open_for_ns,
            heartbeat_ns,
            free_bytes,
            iteration,
            stage,
            num_stages,
            pid,
            ticks,
        )

    def _end(self, reason: str) -> None:
        self._gone_reason = self._gone_reason or reason
        self.open_word, self.until_ns = _NO_WORD, 0
