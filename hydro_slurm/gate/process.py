"""Which process is meant, even after its number has been given to another, and what time it has had.

Standard library only, Python 3.9.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Optional


def start_ticks(pid: int) -> int:
    """Start time of a process since boot, in clock ticks; 0 where /proc does not show it."""
    return _state_and_start(pid)[1]


def is_alive(pid: int, ticks: int) -> bool:
    """Whether the process that had this number and start time still runs (a zombie does not).

    A process that may not be looked at (another user's, with hidepid) counts as alive as long as its number is taken.
    """
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    state, found = _state_and_start(pid)
    return found == 0 or (found == ticks and state not in "ZX")


class Preemption:
    """How long a thread has been ready to run while others had its core, since its start.

    Its present wait is counted when it ends. 0 where the kernel does not count, or the thread has ended.

    Args:
        task: Its name in /proc: the calling thread, or a process's number for that one's main thread.
    """

    def __init__(self, task: str = "thread-self") -> None:
        try:
            self._descriptor = os.open(f"/proc/{task}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._descriptor = -1

    def __call__(self) -> int:
        """In nanoseconds."""
        try:
            return int(os.pread(self._descriptor, 128, 0).split()[1])
        except (OSError, ValueError, IndexError):
            return 0

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


class RunTime:
    """What a process has had of the time since this object was made, apart from waiting for a core.

    A process that others keep from running does nothing, and is not to blame for doing it slowly. One that waits for
    anything else (a GPU works for it, say) is charged for the time.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._began_ns = time.monotonic_ns()
        self._preemption = Preemption(str(pid))
        self._cpu_ns, self._preempted_ns = _cpu_ns(pid), self._preemption()

    def elapsed_ns(self) -> int:
        """Its time so far."""
        wall_ns = time.monotonic_ns() - self._began_ns
        cpu_ns = _cpu_ns(self._pid)
        if cpu_ns is None or self._cpu_ns is None:
            return wall_ns
        if _state_and_start(self._pid)[0] == "R":
            # Running, or waiting for its turn: its processor time tells, its present wait is not counted yet.
            return cpu_ns - self._cpu_ns
        return wall_ns - max(0, self._preemption() - self._preempted_ns)


def _cpu_ns(pid: int) -> Optional[int]:
    # clock_getcpuclockid(3), which Python has for threads of its own process only: ~pid << 3 | CPUCLOCK_SCHED.
    try:
        return time.clock_gettime_ns((~pid << 3) | 2)
    except OSError:
        return None


def _state_and_start(pid: int) -> tuple[str, int]:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        fields = stat[stat.rindex(b")") + 2 :].split()
        return fields[0].decode(), int(fields[19])
    except (OSError, ValueError, IndexError):
        return "", 0
