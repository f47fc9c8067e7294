"""Which process is meant, even after its number has been given to another. Standard library only, Python 3.9."""

from __future__ import annotations

import os
from pathlib import Path


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


def _state_and_start(pid: int) -> tuple[str, int]:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        fields = stat[stat.rindex(b")") + 2 :].split()
        return fields[0].decode(), int(fields[19])
    except (OSError, ValueError, IndexError):
        return "", 0
