"""Processes by pid and start time, and all processes of a testbed wherever they came from.

A testbed's processes are found by their namespace: `/proc/PID/root/run/hydro-testbed` holds the testbed's uuid in
its namespaces and nowhere else. So orphans, daemons and namespaces made inside are found too, and a recycled pid
or namespace number can never be mistaken for ours. Those that are on their way into a namespace have the uuid in
their environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from hydro_slurm.errors import TestbedError
from hydro_slurm.testbed.namespace import MARKER

MEMBER_VARIABLE = "HYDRO_TESTBED_MEMBER"
_MARKER_BELOW = str(MARKER).lstrip("/")


@dataclass(frozen=True)
class Process:
    """One process, told apart from a later one with the same pid. Start in clock ticks since boot."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> Process:
        """The process that runs under `pid` now (start 0: none does)."""
        return cls(pid, _start_ticks(pid) or 0)

    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        return self.start_ticks != 0 and _start_ticks(self.pid) == self.start_ticks

    def send(self, number: int) -> None:
        """Send a signal if it still runs."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def members(uuid: str) -> list[Process]:
    """All living processes in the namespaces of the testbed with this uuid."""
    own = _mount_namespace("self")
    known: set[str] = set()
    found = []
    for entry in os.listdir("/proc"):  # noqa: PTH208
        if not entry.isdigit():
            continue
        process = Process.of(int(entry))
        space = _mount_namespace(entry)
        if not process.start_ticks or space == "":
            continue
        # A process may have a root of its own (chroot), so only a "yes" is good for the whole namespace.
        inside = space != own and (space in known or uuid in _marker(entry))
        if inside:
            known.add(space)
        if inside or _is_marked(entry, uuid):
            found.append(process)
    return found


def kill_members(uuid: str, *, first: list[Process], grace_s: float = 1.0, timeout_s: float = 30.0) -> None:
    """End all processes of a testbed: `first` by SIGTERM with a grace time, then every one by SIGKILL.

    Raises:
        TestbedError: Some are still there after the timeout, or the caller is one of them.
    """
    if uuid in _marker("self"):
        raise TestbedError("this command runs inside the testbed that it shall end; run it outside")
    for process in first:
        process.send(signal.SIGTERM)
    wait_dead(first, grace_s)
    deadline = time.monotonic() + timeout_s
    num_empty = 0
    while num_empty < 2:  # twice: one may have been about to enter
        left = members(uuid)
        num_empty = 0 if left else num_empty + 1
        for process in left:
            process.send(signal.SIGKILL)
        if left and time.monotonic() > deadline:
            names = ", ".join(f"{process.pid} ({_name(process.pid)})" for process in left)
            raise TestbedError(f"processes of the testbed survive SIGKILL: {names}; look at them with `ps -l`")
        time.sleep(0.02)


def wait_dead(processes: list[Process], timeout_s: float) -> bool:
    """Wait until none of them runs any more; say whether that came about."""
    deadline = time.monotonic() + timeout_s
    while any(process.alive() for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _mount_namespace(pid: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")  # noqa: PTH115
    except OSError:
        return ""


def _marker(pid: str) -> list[str]:
    try:
        return Path(f"/proc/{pid}/root/{_MARKER_BELOW}").read_text().split()
    except (OSError, UnicodeDecodeError):
        return []


def _is_marked(pid: str, uuid: str) -> bool:
    try:
        return f"{MEMBER_VARIABLE}={uuid}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _start_ticks(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "gone"
