"""Signals for a child and everything that it has started. Standard library only, Python 3.9."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path
from typing import Optional

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_MAX_SWEEPS = 16

_prctl = ctypes.CDLL(None, use_errno=True).prctl


def die_with_parent(number: int) -> None:
    """Have the kernel send this signal to the calling process when its parent ends, however that ends."""
    _prctl(ctypes.c_int(_PR_SET_PDEATHSIG), ctypes.c_ulong(number))


def adopt_orphans() -> None:
    """Become the parent of grandchildren whose own parent ends, instead of init."""
    _prctl(ctypes.c_int(_PR_SET_CHILD_SUBREAPER), ctypes.c_ulong(1))


def descendants(pid: int) -> list[int]:
    """Children, grandchildren and so on of a process, from one look at /proc; ended ones are left out."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 - hundreds of names, of which most are needed as text only
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                stat = Path("/proc", entry, "stat").read_bytes()
                fields = stat[stat.rindex(b")") + 2 :].split(maxsplit=2)
                if fields[0] not in (b"Z", b"X"):
                    children.setdefault(int(fields[1]), []).append(int(entry))
    found, unseen = [], [pid]
    while unseen:
        for child in children.get(unseen.pop(), ()):
            found.append(child)
            unseen.append(child)
    return found


class ProcessTree:
    """Everything below the calling process, whose child `leader` heads a session of its own.

    The group of the leader gets a signal by one system call. Who has left it (daemons, `setsid`) is found in /proc
    afterwards, in sweeps, until no new process turns up: a process that is not stopped yet may be forking.
    """

    def __init__(self, leader: Optional[int] = None) -> None:
        self.leader = leader
        """None once it has been waited for: its number may then be another's."""

    def stop(self) -> None:
        """SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, which stopped processes get too."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.leader is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.leader, number)
        reached: set[int] = set()
        for _ in range(_MAX_SWEEPS):
            found = set(descendants(os.getpid())) - reached
            if not found:
                return
            for pid in found:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
            reached |= found
