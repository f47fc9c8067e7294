"""A private, real Slurm cluster on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from hydro_slurm.errors import SlurmError, SlurmUnavailableError, TestbedError
from hydro_slurm.slurm.command_line import CommandLineClient
from hydro_slurm.slurm.environment import scrubbed_environment
from hydro_slurm.slurm.records import Node
from hydro_slurm.testbed import record as records
from hydro_slurm.testbed.configuration import CONTROLLER, LOGIN, write_configuration
from hydro_slurm.testbed.machines import DaemonFailedError, Daemons, enter, require_programs, spawn, start_holders
from hydro_slurm.testbed.processes import Process, boot_id, wait_dead
from hydro_slurm.testbed.record import TestbedRecord
from hydro_slurm.testbed.spec import TestbedSpec, made_up_name
from hydro_slurm.testbed.teardown import clean_stale, take_down

_PORT_ATTEMPTS = 3
_FOREIGN_VARIABLES = ("TMPDIR", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "MAIL")
"""Variables that point into the caller's own folders: another user must not inherit them."""


@dataclass(frozen=True)
class TestbedStatus:
    """What `hydro testbed status` shows of one testbed."""

    __test__ = False

    name: str
    phase: str
    ephemeral: bool
    state_dir: str
    slurm_conf: str
    slurm_version: str
    """Empty while slurmctld does not answer."""
    num_processes: int
    nodes: tuple[Node, ...]


class Testbed:
    """A running testbed. Use as a context manager, or call `down`."""

    __test__ = False

    def __init__(self, state: Path, record: TestbedRecord) -> None:
        self.state_dir, self._record = state, record
        self._daemons = Daemons(state, record, CONTROLLER)
        self._processes: list[subprocess.Popen[bytes]] = []

    @classmethod
    def up(cls, spec: TestbedSpec | None = None, *, ephemeral: bool = False) -> Testbed:
        """Start a cluster and wait until every node is idle.

        Args:
            ephemeral: Take it down when this process dies, however it dies.

        Raises:
            TestbedError: It cannot be started. Nothing of it is left then.
        """
        require_programs()
        spec = spec or TestbedSpec()
        base = records.base_folder(spec.base)
        clean_stale(base)
        for attempt in range(_PORT_ATTEMPTS):
            try:
                return cls._up_once(base, spec, ephemeral)
            except DaemonFailedError as error:
                if "Address already in use" not in error.log_tail or attempt == _PORT_ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    @classmethod
    def load(cls, name: str | None = None, base: Path | None = None) -> Testbed:
        """The testbed of this name that is up; without a name, the only one.

        Raises:
            TestbedError: There is none, or (without a name) more than one.
        """
        folder = records.base_folder(base)
        if name is None:
            names = [path.name for path in records.folders(folder)]
            if len(names) != 1:
                raise TestbedError(f"{len(names)} testbeds are up ({', '.join(names) or 'none'}); say which by --name")
            name = names[0]
        state = folder / name
        return cls(state, records.load(state))

    @classmethod
    def _up_once(cls, base: Path, spec: TestbedSpec, ephemeral: bool) -> Testbed:
        with records.locked(base):
            record = TestbedRecord(
                name=spec.name or made_up_name(),
                uuid=str(uuid.uuid4()),
                phase="starting",
                ephemeral=ephemeral,
                boot_id=boot_id(),
                creator=Process.of(os.getpid()),
                nodes=spec.node_names,
                cpus=spec.cpus,
                memory_mib=spec.memory_mib,
                gres=spec.gres,
                ports=records.free_ports(base, 1 + spec.nodes),
            )
            state = records.claim(base, record)
        testbed = cls(state, record)
        try:
            testbed._start(spec)
        except BaseException:
            testbed.down()
            raise
        return testbed

    def _start(self, spec: TestbedSpec) -> None:
        deadline = time.monotonic() + spec.start_timeout_s
        guardian = self._start_guardian()
        self._update(guardian=guardian)
        write_configuration(self.state_dir, spec, self.name, list(self._record.ports))
        machines = (CONTROLLER, LOGIN, *self.nodes)
        holders = start_holders(self.state_dir, self._record, machines, spec.expose)
        self._processes += holders.values()
        self._update(holders={name: Process.of(holder.pid) for name, holder in holders.items()})
        self._daemons = Daemons(self.state_dir, self._record, CONTROLLER)
        self._note_daemon("munged", self._daemons.start_munged(_left(deadline)))
        self._note_daemon("slurmctld", self._daemons.start_controller(self._record.ports[0], _left(deadline)))
        slurmds = {node: self._daemons.start_node(node) for node in self.nodes}
        self._update(daemons={**self._record.daemons, **slurmds})
        self._wait_idle(deadline)
        if self._record.ephemeral:
            self._update(phase="up")
        else:
            self._update(phase="up", guardian=None)
            guardian.send(signal.SIGTERM)

    def _start_guardian(self) -> Process:
        creator = self._record.creator
        root = str(Path(__file__).parents[2])
        code = (
            f"import sys; sys.path.insert(0, {root!r}); from hydro_slurm.testbed.guardian import main; main(sys.argv)"
        )
        argv = [sys.executable, "-c", code, str(self.state_dir), str(creator.pid), str(creator.start_ticks)]
        child = spawn(argv, self.state_dir / "log" / "guardian.log")
        self._processes.append(child)
        return Process.of(child.pid)

    def _wait_idle(self, deadline: float) -> None:
        client = self.client(timeout_s=2.0)
        states = {}
        while time.monotonic() < deadline:
            self._daemons.check()
            with contextlib.suppress(SlurmUnavailableError):
                states = {node.name: node.state if node.responding else "away" for node in client.nodes()}
                if set(states) == set(self.nodes) and set(states.values()) == {"IDLE"}:
                    return
            time.sleep(0.05)
        guilty = next((node for node in self.nodes if states.get(node) != "IDLE"), "slurmctld")
        raise DaemonFailedError(
            f"not every node is idle in time ({', '.join(f'{n} {s}' for n, s in states.items()) or 'no answer'}); "
            f"{guilty} is the first",
            self._daemons.log_tail(guilty),
        )

    def __enter__(self) -> Testbed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    @property
    def name(self) -> str:
        return self._record.name

    @property
    def caller(self) -> str:
        """The user who runs this process, and as whom commands run unless another is named."""
        return pwd.getpwuid(os.geteuid()).pw_name

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes' names."""
        return self._record.nodes

    @property
    def shared_dir(self) -> Path:
        """A folder that every user may write to, the same on all machines: the shared file system."""
        return self.state_dir / "shared"

    @property
    def env(self) -> dict[str, str]:
        """What must be in the environment of a Slurm command so that it speaks to this cluster."""
        return {"SLURM_CONF": str(self.state_dir / "conf" / "slurm.conf")}

    def down(self) -> None:
        """End every process of the testbed, check that none is left, and remove its folder.

        Raises:
            TestbedError: A process cannot be ended.
        """
        if self.state_dir.exists():
            take_down(self.state_dir)
        for child in self._processes:
            child.wait(10.0)
        self._daemons.reap()

    def status(self) -> TestbedStatus:
        """What runs now; an answer even while slurmctld is down."""
        version = ""
        nodes: tuple[Node, ...] = ()
        try:
            client = self.client(timeout_s=3.0)
            nodes, version = tuple(client.nodes()), client.version()
        except (SlurmError, TestbedError):
            pass  # slurmctld is away, or the machines are being set up
        record = records.load(self.state_dir)
        return TestbedStatus(
            name=self.name,
            phase=record.phase,
            ephemeral=record.ephemeral,
            state_dir=str(self.state_dir),
            slurm_conf=self.env["SLURM_CONF"],
            slurm_version=version,
            num_processes=len(records.living(record)),
            nodes=nodes,
        )

    def client(self, user: str | None = None, *, timeout_s: float = 30.0) -> CommandLineClient:
        """A client whose commands run as `user` (default: the caller) on the login machine."""
        return CommandLineClient(prefix=self.command_prefix(user), timeout_s=timeout_s)

    def command_prefix(self, user: str | None = None, node: str | None = None) -> list[str]:
        """What to put before a command so that it runs as `user` on `node` (default: the login machine).

        The command starts in the user's home below `shared_dir`, with HOME, USER, LOGNAME and SLURM_CONF set.

        Raises:
            TestbedError: No such node or user, or not root and another user than the caller.
        """
        holder = self._record.holders.get(node or LOGIN)
        if holder is None:
            raise TestbedError(f"no node {node!r} in testbed {self.name}; it has {', '.join(self.nodes)}")
        account = _account(user)
        home = self._home(account)
        environment = [f"HOME={home}", f"USER={account.pw_name}", f"LOGNAME={account.pw_name}"]
        environment += [f"{name}={value}" for name, value in self.env.items()]
        prefix = enter(holder)
        if account.pw_uid != os.geteuid():
            prefix += ["setpriv", "--reuid", str(account.pw_uid), "--regid", str(account.pw_gid), "--init-groups", "--"]
            environment = [*(f"--unset={name}" for name in _FOREIGN_VARIABLES), *environment]
        return [*prefix, "env", f"--chdir={home}", *environment]

    def run(
        self,
        argv: Sequence[str],
        *,
        user: str | None = None,
        node: str | None = None,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        timeout_s: float = 60.0,
        stdin: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, on the login machine or on `node`, and return what it wrote.

        Raises:
            TestbedError: It took too long, or (with `check`) exited with another status than 0.
        """
        try:
            done = subprocess.run(
                [*self.command_prefix(user, node), *argv],
                env=self._environment(env),
                input=stdin,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise TestbedError(f"{argv[0]!r} did not end within {timeout_s:g} s in testbed {self.name}") from None
        if check and done.returncode != 0:
            raise TestbedError(f"{list(argv)} exited {done.returncode} in testbed {self.name}: {done.stderr.strip()}")
        return done

    def popen(
        self,
        argv: Sequence[str],
        *,
        user: str | None = None,
        node: str | None = None,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Start a command as `run` does, and return at once. `options` go to `subprocess.Popen`."""
        return subprocess.Popen([*self.command_prefix(user, node), *argv], env=self._environment(env), **options)

    def ordinary_user(self) -> str:
        """Somebody who is not root: when root, $SUDO_USER or `nobody`; else the caller."""
        if os.geteuid() != 0:
            return self.caller
        name = os.environ.get("SUDO_USER", "")
        with contextlib.suppress(KeyError):
            if pwd.getpwnam(name).pw_uid != 0:
                return name
        return "nobody"

    def stop_controller(self, timeout_s: float = 30.0) -> None:
        """Stop slurmctld, as if its machine were down; jobs go on.

        Raises:
            TestbedError: It does not end in time.
        """
        self._record = records.load(self.state_dir)
        process = self._record.daemons.get("slurmctld")
        if process is None:
            return
        process.send(signal.SIGTERM)
        if not wait_dead([process], timeout_s):
            raise TestbedError(f"slurmctld of testbed {self.name} did not end within {timeout_s:g} s")
        self._daemons.forget("slurmctld")
        self._update(daemons={name: p for name, p in self._record.daemons.items() if name != "slurmctld"})

    def start_controller(self, timeout_s: float = 30.0) -> None:
        """Start slurmctld again, with the jobs that it knew; return when it answers.

        Raises:
            TestbedError: It does not answer in time.
        """
        self._record = records.load(self.state_dir)
        deadline = time.monotonic() + timeout_s
        current = self._record.daemons.get("slurmctld")
        if current is None or not current.alive():
            self._note_daemon("slurmctld", self._daemons.start_controller(self._record.ports[0], timeout_s))
        client = self.client(timeout_s=5.0)
        while True:
            self._daemons.check()
            try:
                client.partitions()
                return
            except SlurmUnavailableError as error:
                if time.monotonic() > deadline:
                    raise TestbedError(f"slurmctld does not answer after {timeout_s:g} s: {error}") from None
            time.sleep(0.05)

    def _environment(self, extra: Mapping[str, str] | None) -> dict[str, str]:
        return {**scrubbed_environment(), **(extra or {})}

    def _home(self, account: pwd.struct_passwd) -> Path:
        home = self.shared_dir / "homes" / account.pw_name
        if not home.exists():
            home.mkdir(exist_ok=True)
            home.chmod(0o755)
            if account.pw_uid != os.geteuid():
                os.chown(home, account.pw_uid, account.pw_gid)
        return home

    def _note_daemon(self, name: str, process: Process) -> None:
        self._update(daemons={**self._record.daemons, name: process})

    def _update(self, **changes: Any) -> None:
        self._record = dataclasses.replace(self._record, **changes)
        records.save(self.state_dir, self._record)


def list_testbeds(base: Path | None = None) -> list[Testbed]:
    """All testbeds of this user that are up; stale ones are taken down first."""
    folder = records.base_folder(base)
    clean_stale(folder)
    return [Testbed(state, records.load(state)) for state in records.folders(folder)]


def _account(user: str | None) -> pwd.struct_passwd:
    try:
        account = pwd.getpwnam(user) if user is not None else pwd.getpwuid(os.geteuid())
    except KeyError:
        raise TestbedError(f"no user {user or os.geteuid()!r} on this machine") from None
    if account.pw_uid != os.geteuid() and os.geteuid() != 0:
        raise TestbedError(f"only root can run commands as {account.pw_name}; leave the user out")
    return account


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
