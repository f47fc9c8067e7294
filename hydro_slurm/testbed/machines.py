"""Starts the machines of a testbed (sets of namespaces) and its daemons in them."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hydro_slurm.errors import TestbedError
from hydro_slurm.slurm.environment import scrubbed_environment
from hydro_slurm.testbed import namespace
from hydro_slurm.testbed.processes import MEMBER_VARIABLE, Process
from hydro_slurm.testbed.record import TestbedRecord

NEEDED_PROGRAMS = ("slurmctld", "slurmd", "sinfo", "srun", "munged", "unshare", "nsenter", "setpriv")
LOG_TAIL_LINES = 12
_READY_TIMEOUT_S = 30.0


class DaemonFailedError(TestbedError):
    """A daemon ended, or did not become ready. `log_tail`: the last lines of what it logged."""

    def __init__(self, message: str, log_tail: str) -> None:
        super().__init__(f"{message}; the end of its log:\n{log_tail}" if log_tail else message)
        self.log_tail = log_tail


def missing_programs() -> list[str]:
    """Programs that a testbed needs and this machine lacks."""
    return [name for name in NEEDED_PROGRAMS if shutil.which(name, path=_search_path()) is None]


def require_programs() -> None:
    """Check that everything is installed.

    Raises:
        TestbedError: Something is not; it says what, and how to get it.
    """
    missing = missing_programs()
    if missing:
        raise TestbedError(
            f"not installed: {', '.join(missing)}; on Debian: apt-get install slurmctld slurmd slurm-client munge "
            "util-linux"
        )


def _search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def start_holders(
    state: Path, record: TestbedRecord, names: Sequence[str], expose: Sequence[Path]
) -> dict[str, subprocess.Popen[bytes]]:
    """Make the namespaces of all named machines; return the process that holds each.

    Raises:
        TestbedError: The kernel, or the container around us, does not allow it.
    """
    user_namespace = ["--user", "--map-current-user", "--keep-caps"] if os.geteuid() else []
    starting = []
    for name in names:
        settings = {
            "testbed": record.name,
            "uuid": record.uuid,
            "hostname": name,
            "expose": [str(path) for path in (state, *expose)],
            "conf_dir": str(state / "conf"),
        }
        reader, writer = os.pipe()
        python = [sys.executable, "-I", "-S", namespace.__file__, json.dumps(settings), str(writer)]
        argv = ["unshare", *user_namespace, "--mount", "--uts", "--ipc", "--", *python]
        log = state / "log" / f"{name}.holder.log"
        try:
            holder = spawn(argv, log, uuid=record.uuid, pass_fds=(writer,))
        finally:
            os.close(writer)
        starting.append((name, holder, reader, log))
    holders = {}
    failures = []
    for name, holder, reader, log in starting:
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read().decode(errors="replace")
        if answer == "ok":
            holders[name] = holder
        else:
            holder.wait(_READY_TIMEOUT_S)
            failures.append(f"machine {name}: {answer or tail(log)}")
    if failures:
        raise TestbedError(
            f"cannot make namespaces ({failures[0].strip()}); this needs root with CAP_SYS_ADMIN, or unprivileged user "
            "namespaces: in a container, run it with --privileged"
        )
    return holders


def enter(holder: Process) -> list[str]:
    """The command prefix that runs a command in a holder's namespaces."""
    user_namespace = ["--user", "--preserve-credentials"] if os.geteuid() else []
    return ["nsenter", "--target", str(holder.pid), *user_namespace, "--mount", "--uts", "--ipc", "--"]


def spawn(argv: Sequence[str], log: Path, *, uuid: str = "", pass_fds: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, with its output in a log file.

    Args:
        uuid: Of the testbed that the process belongs to from its start on, before it has entered any namespace.
    """
    with log.open("ab") as output:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            env={**scrubbed_environment(), "PATH": _search_path(), **({MEMBER_VARIABLE: uuid} if uuid else {})},
            pass_fds=pass_fds,
            umask=0o022,
            start_new_session=True,
        )


class Daemons:
    """Starts munged, slurmctld and slurmd of one testbed, each in the namespaces of its machine."""

    def __init__(self, state: Path, record: TestbedRecord, controller: str) -> None:
        self._state, self._uuid, self._holders, self._controller = state, record.uuid, record.holders, controller
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start_munged(self, timeout_s: float) -> Process:
        folder = self._state / "munge"
        (folder / "key").touch(mode=0o600)
        (folder / "key").write_bytes(secrets.token_bytes(128))
        options = {
            "key-file": folder / "key",
            "socket": folder / "socket",
            "pid-file": folder / "pid",
            "seed-file": folder / "seed",
            "log-file": self._state / "log" / "munged.log",
        }
        # In a user namespace root's /tmp seems to belong to nobody, which munged refuses unless it is forced.
        force = ["--force"] if os.geteuid() else []
        argv = [
            "munged",
            "--foreground",
            "--num-threads=2",
            *force,
            *(f"--{name}={path}" for name, path in options.items()),
        ]
        return self._start("munged", self._controller, argv, lambda: _answers(folder / "socket"), timeout_s)

    def start_controller(self, port: int, timeout_s: float) -> Process:
        argv = ["slurmctld", "-D", "-f", str(self._state / "conf" / "slurm.conf")]
        return self._start("slurmctld", self._controller, argv, lambda: _answers(port), timeout_s)

    def start_node(self, node: str) -> Process:
        """Start a node's slurmd; whether it registers is seen by asking slurmctld."""
        argv = ["slurmd", "-D", "-N", node, "-f", str(self._state / "conf" / "slurm.conf")]
        return self._start(node, node, argv, lambda: True, 0.0)

    def check(self) -> None:
        """Raise if a daemon that was started here has ended.

        Raises:
            DaemonFailedError: With the last lines that it logged.
        """
        for name, child in self._children.items():
            if child.poll() is not None:
                raise DaemonFailedError(f"{name} ended with status {child.returncode}", self.log_tail(name))

    def log_tail(self, name: str) -> str:
        """The last lines of what a daemon said, or of its log file where it said nothing."""
        folder = self._state / "log"
        return tail(folder / f"{name}.log") or tail(folder / f"{name}.out")

    def forget(self, name: str) -> None:
        """A daemon was stopped on purpose."""
        child = self._children.pop(name, None)
        if child is not None:
            child.wait(_READY_TIMEOUT_S)

    def reap(self) -> None:
        """Collect what has ended, so that no zombie is left."""
        for child in self._children.values():
            child.poll()

    def _start(self, name: str, machine: str, argv: list[str], ready: Callable[[], bool], timeout_s: float) -> Process:
        output = self._state / "log" / f"{name}.out"
        child = spawn([*enter(self._holders[machine]), *argv], output, uuid=self._uuid)
        self._children[name] = child
        process = Process.of(child.pid)
        deadline = time.monotonic() + timeout_s
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise DaemonFailedError(f"{name} is not ready after {timeout_s:g} s", self.log_tail(name))
            time.sleep(0.02)
        return process


def tail(log: Path) -> str:
    """The last lines of a log file; empty where there is none."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-LOG_TAIL_LINES:])


def _answers(address: Path | int) -> bool:
    """Whether somebody listens on a Unix socket, or on a port of this machine."""
    with socket.socket(socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET) as probe:
        try:
            probe.connect(str(address) if isinstance(address, Path) else ("127.0.0.1", address))
        except OSError:
            return False
    return True
