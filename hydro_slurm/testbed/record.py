"""The state folder of a testbed, and what stands in its `testbed.json`."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Optional

from hydro_slurm.errors import FormatError, TestbedError
from hydro_slurm.formats import read_record, write_record
from hydro_slurm.testbed.processes import Process, boot_id, members

RECORD_FILE = "testbed.json"
MAX_SOCKET_PATH = 107
_FIRST_PORT, _LAST_PORT = 12000, 32000


@dataclass(frozen=True)
class TestbedRecord:
    """Everything that another process needs in order to use a testbed, or to clean up after it."""

    __test__: ClassVar[bool] = False
    FORMAT: ClassVar[str] = "hydro.testbed"
    VERSION: ClassVar[int] = 1

    name: str
    uuid: str
    phase: str
    """starting or up."""
    ephemeral: bool
    boot_id: str
    creator: Process
    nodes: tuple[str, ...]
    cpus: int
    memory_mib: int
    gres: str
    ports: tuple[int, ...] = ()
    """The controller's, then one for each node."""
    guardian: Optional[Process] = None
    holders: dict[str, Process] = field(default_factory=dict)
    """The process that holds each machine's namespaces; by machine name."""
    daemons: dict[str, Process] = field(default_factory=dict)
    """munged, slurmctld, and each node's slurmd by the node's name."""

    @property
    def stale(self) -> bool:
        """Whether nobody will use it again: its creator died too early, or its processes are gone."""
        if self.boot_id != boot_id():
            return True
        if self.phase == "starting" or self.ephemeral:
            return not self.creator.alive()
        return not any(holder.alive() for holder in self.holders.values())


def base_folder(base: Path | None = None) -> Path:
    """The folder that holds this user's testbeds; made if it does not exist.

    Raises:
        TestbedError: It belongs to somebody else, or cannot be made.
    """
    path = base or Path(os.environ.get("HYDRO_TESTBED_DIR") or f"/tmp/hydro-testbed-{os.getuid()}")
    path = Path(os.path.abspath(path))  # noqa: PTH100  (links stay: the path must stay short)
    try:
        if not path.exists():
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o755)
        found = path.lstat()
    except OSError as error:
        raise TestbedError(f"{path}: {error.strerror}; set HYDRO_TESTBED_DIR to a folder of your own") from None
    if base is None and "HYDRO_TESTBED_DIR" not in os.environ:
        if found.st_uid != os.getuid() or path.is_symlink():
            raise TestbedError(f"{path} belongs to user {found.st_uid}; set HYDRO_TESTBED_DIR to a folder of your own")
        path.chmod(0o755)
    return path


def claim(base: Path, record: TestbedRecord) -> Path:
    """Make the state folder of a new testbed, with its record in it, in one step.

    Raises:
        TestbedError: The name is taken, or the folder's path is too long for sockets.
    """
    state = base / record.name
    longest = state / "spool" / f"{record.nodes[-1]}_1234567890.4294967295"
    if len(bytes(longest)) > MAX_SOCKET_PATH:
        raise TestbedError(
            f"{state}: {len(bytes(longest)) - MAX_SOCKET_PATH} bytes too long for the sockets in it; "
            "set HYDRO_TESTBED_DIR to a shorter path, or choose a shorter name"
        )
    temporary = Path(tempfile.mkdtemp(prefix=f".new-{os.getpid()}-", dir=base))
    try:
        temporary.chmod(0o755)
        for name in ("conf", "munge", "log", "spool", "spool/ctl", "dev", "shared", "shared/homes"):
            _make_open(temporary / name)
        for name in record.nodes:
            _make_open(temporary / "spool" / name)
        (temporary / "shared").chmod(0o1777)
        save(temporary, record)
        temporary.rename(state)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if state.exists():
            raise TestbedError(
                f"a testbed called {record.name!r} exists already; `hydro testbed down` it first"
            ) from None
        raise
    return state


def _make_open(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)  # whatever the umask is


def save(state: Path, record: TestbedRecord) -> None:
    write_record(state / RECORD_FILE, record)


def load(state: Path) -> TestbedRecord:
    """Read a testbed's record.

    Raises:
        TestbedError: There is no testbed in this folder.
    """
    try:
        return read_record(TestbedRecord, state / RECORD_FILE)
    except FileNotFoundError:
        raise TestbedError(
            f"no testbed called {state.name!r} in {state.parent}; `hydro testbed up` makes one"
        ) from None
    except FormatError as error:
        raise TestbedError(f"{error}; remove {state} if no process uses it") from None


def folders(base: Path) -> list[Path]:
    """The state folders of all testbeds in a base folder, stale ones included."""
    return sorted(path.parent for path in base.glob(f"*/{RECORD_FILE}") if not path.parent.name.startswith("."))


def remove(state: Path) -> None:
    """Delete a state folder.

    Raises:
        TestbedError: Something in it cannot be deleted.
    """
    doomed = state.parent / f".old-{os.getpid()}-{state.name}"
    with contextlib.suppress(FileNotFoundError):
        state.rename(doomed)  # so that the name is free at once, and half a folder is never taken for a testbed
    shutil.rmtree(doomed, ignore_errors=True)
    if doomed.exists():
        raise TestbedError(f"{doomed} cannot be removed wholly; remove it by hand")


def remove_leftovers(base: Path) -> None:
    """Delete what creators and removers that died in mid-work have left."""
    for path in [*base.glob(".new-*"), *base.glob(".old-*")]:
        pid = path.name.split("-")[1]
        if pid.isdigit() and not Process.of(int(pid)).alive():
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked(base: Path) -> Iterator[None]:
    """Hold the base folder's lock: while ports are chosen, so that two testbeds do not choose the same."""
    with (base / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def free_ports(base: Path, count: int) -> tuple[int, ...]:
    """Ports that nobody listens on and no other testbed has chosen; below the range that clients draw from."""
    taken: set[int] = set()
    for state in folders(base):
        with contextlib.suppress(TestbedError):
            taken.update(load(state).ports)
    found: list[int] = []
    candidates = list(range(_FIRST_PORT, _LAST_PORT))
    random.SystemRandom().shuffle(candidates)
    for port in candidates:
        if len(found) == count:
            return tuple(found)
        if port not in taken and _is_free(port):
            found.append(port)
    raise TestbedError(f"only {len(found)} of {count} ports are free between {_FIRST_PORT} and {_LAST_PORT}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def living(record: TestbedRecord) -> list[Process]:
    """All processes of the testbed that run now, without its guardian."""
    return members(record.uuid) if record.boot_id == boot_id() else []
