"""The supervisor, with real processes, signals and gates."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hydro_slurm.errors import GateError
from hydro_slurm.gate.bundle_page import BundlePage
from hydro_slurm.gate.layout import PAUSED, RUNNING
from hydro_slurm.gate.process_tree import descendants
from hydro_slurm.gate.writer import GateWriter

BUNDLE = Path(__file__).parent / "programs" / "bundle.py"
Eventually = Callable[[Callable[[], bool]], None]
Supervise = Callable[..., "subprocess.Popen[str]"]


def state_of(pid: int) -> str:
    """R, S, T (stopped), Z, or nothing where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_gone(pid: int) -> bool:
    return state_of(pid) in ("", "Z", "X")


def is_stopped(pid: int) -> bool:
    return state_of(pid) == "T"


def page_state(gate_directory: Path) -> int:
    """What the bundle says of itself; -1 where it says nothing."""
    try:
        page = BundlePage.attach(gate_directory, "b1")
        try:
            found = page.snapshot()
        finally:
            page.close()
    except GateError:
        return -1
    return -1 if found is None else found.state


def open_for(writer: GateWriter, seconds: float) -> None:
    writer.open(time.monotonic_ns() + int(seconds * 1e9))


@pytest.fixture
def writer(gate_directory: Path) -> Iterator[GateWriter]:
    """A host whose heart beats: on a busy machine these tests take longer than heartbeats stay fresh."""
    with GateWriter.create(gate_directory, stage=0, num_stages=2) as writer:
        over = threading.Event()

        def beat() -> None:
            while not over.wait(0.5):
                writer.heartbeat()

        thread = threading.Thread(target=beat)
        thread.start()
        yield writer
        over.set()
        thread.join()


@pytest.fixture
def supervise(gate_directory: Path) -> Iterator[Supervise]:
    """Start a supervisor over a bundle of some character, or over a command; all of it is killed afterwards."""
    started: list[subprocess.Popen[str]] = []

    def start(*command: object, options: tuple[object, ...] = (), gated: bool = True) -> subprocess.Popen[str]:
        if len(command) == 1 and isinstance(command[0], str):
            command = (sys.executable, BUNDLE, gate_directory, command[0])
        gate = ("--gate-dir", gate_directory) if gated else ()
        module = (sys.executable, "-m", "hydro_slurm.gate.supervisor")
        argv = [str(word) for word in (*module, "--bundle", "b1", *gate, *options, "--", *command)]
        process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        below = descendants(process.pid)
        for pid in [*below, process.pid]:
            if process.returncode is None or pid != process.pid:
                os.kill(pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def only_child(eventually: Eventually) -> Callable[[int], int]:
    """The bundle of a supervisor, once it runs its own program."""

    def find(supervisor: int) -> int:
        eventually(
            lambda: any(
                b"supervisor" not in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(supervisor)
            )
        )
        return descendants(supervisor)[0]

    return find


OnlyChild = Callable[[int], int]


def test_a_good_bundle_is_left_alone(
    writer: GateWriter, supervise: Supervise, only_child: OnlyChild, eventually: Eventually, gate_directory: Path
) -> None:
    open_for(writer, 30)
    supervisor = supervise("good")
    bundle = only_child(supervisor.pid)
    eventually(lambda: page_state(gate_directory) == RUNNING)
    for _ in range(12):
        writer.close()
        eventually(lambda: page_state(gate_directory) == PAUSED)
        assert not is_stopped(bundle)
        open_for(writer, 0.05)
        time.sleep(0.06)
    writer.leave()
    assert supervisor.wait(20) == 7
    assert supervisor.stderr is not None
    assert "strike" not in supervisor.stderr.read()


def test_a_bundle_that_took_its_page_away_may_end_in_peace(writer: GateWriter, supervise: Supervise) -> None:
    supervisor = supervise("parting", options=("--undivided-s", 0.05))
    deadline_s = time.monotonic() + 60
    while supervisor.poll() is None and time.monotonic() < deadline_s:
        open_for(writer, 0.03)
        time.sleep(0.06)
    # Its own status: a second of computing on, some ten leases long, would have cost it its three strikes many times.
    assert supervisor.wait(1) == 3


def test_a_rogue_is_stopped_continued_and_after_three_strikes_killed(
    writer: GateWriter, supervise: Supervise, only_child: OnlyChild, eventually: Eventually, gate_directory: Path
) -> None:
    open_for(writer, 30)
    supervisor = supervise("rogue")
    bundle = only_child(supervisor.pid)
    eventually(lambda: page_state(gate_directory) == RUNNING)
    for _ in range(2):
        assert not is_stopped(bundle)
        writer.close()
        eventually(lambda: is_stopped(bundle))
        open_for(writer, 30)
        eventually(lambda: state_of(bundle) == "R")
    open_for(writer, 0.05)  # this time nobody closes: the lease ends by itself
    assert supervisor.wait(20) == 75
    eventually(lambda: is_gone(bundle))
    assert supervisor.stderr is not None
    assert "strike 3 of 3" in supervisor.stderr.read()


def test_a_bundle_that_starts_is_stopped_without_strikes(
    writer: GateWriter, supervise: Supervise, only_child: OnlyChild, eventually: Eventually
) -> None:
    supervisor = supervise("starting")
    eventually(lambda: bool(descendants(supervisor.pid)))
    bundle = descendants(supervisor.pid)[0]
    for _ in range(6):
        eventually(lambda: is_stopped(bundle))
        open_for(writer, 30)
        eventually(lambda: state_of(bundle) == "R")
        writer.close()
    assert supervisor.poll() is None


def test_starting_for_too_long_costs_strikes(writer: GateWriter, supervise: Supervise) -> None:
    supervisor = supervise("starting", options=("--undivided-s", 0))
    for _ in range(40):
        open_for(writer, 0.02)
        time.sleep(0.04)
        if supervisor.poll() is not None:
            break
    assert supervisor.wait(20) == 75


def test_the_page_of_an_earlier_process_is_not_believed(
    writer: GateWriter, supervise: Supervise, only_child: OnlyChild, eventually: Eventually, gate_directory: Path
) -> None:
    page = BundlePage.create(gate_directory, "b1")
    page.state = PAUSED
    page.publish()
    open_for(writer, 30)
    bundle = only_child(supervise("starting").pid)
    writer.close()
    eventually(lambda: is_stopped(bundle))


def test_grandchildren_are_stopped_continued_and_killed_with_it(
    writer: GateWriter, supervise: Supervise, eventually: Eventually
) -> None:
    open_for(writer, 30)
    supervisor = supervise("family", options=("--grace-s", 0.2))
    eventually(lambda: len(descendants(supervisor.pid)) == 3)
    family = descendants(supervisor.pid)
    eventually(lambda: any(os.getsid(pid) == pid != os.getsid(family[0]) for pid in family[1:]))
    writer.close()
    eventually(lambda: all(is_stopped(pid) for pid in family))
    open_for(writer, 30)
    eventually(lambda: not any(is_stopped(pid) for pid in family))
    os.kill(family[0], signal.SIGKILL)
    assert supervisor.wait(20) == 137
    eventually(lambda: all(is_gone(pid) for pid in family))


@pytest.mark.parametrize("gate_state", ["open", "closed"])
def test_sigterm_reaches_the_bundle_stopped_or_not(
    writer: GateWriter, supervise: Supervise, only_child: OnlyChild, eventually: Eventually, gate_state: str
) -> None:
    open_for(writer, 30)
    supervisor = supervise("obedient")
    bundle = only_child(supervisor.pid)
    eventually(lambda: catches(bundle, signal.SIGTERM))
    if gate_state == "closed":
        writer.close()
        eventually(lambda: is_stopped(bundle))
    supervisor.terminate()
    assert supervisor.wait(20) == 9


def catches(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    masks = {line.partition(":")[0]: line.partition(":")[2] for line in status.splitlines()}
    return bool((int(masks["SigCgt"], 16) | int(masks["SigIgn"], 16)) >> (number - 1) & 1)


def test_a_bundle_that_ignores_sigterm_is_killed_after_its_grace(
    writer: GateWriter, supervise: Supervise, only_child: OnlyChild, eventually: Eventually
) -> None:
    open_for(writer, 30)
    supervisor = supervise("stubborn", options=("--grace-s", 0.3))
    bundle = only_child(supervisor.pid)
    eventually(lambda: catches(bundle, signal.SIGTERM))
    supervisor.terminate()
    assert supervisor.wait(20) == 137
    assert is_gone(bundle)


def test_a_bundle_that_stays_after_the_host_is_killed_after_its_grace(
    writer: GateWriter, supervise: Supervise, only_child: OnlyChild, eventually: Eventually, gate_directory: Path
) -> None:
    open_for(writer, 30)
    supervisor = supervise("endless", options=("--grace-s", 0.3))
    bundle = only_child(supervisor.pid)
    eventually(lambda: page_state(gate_directory) == RUNNING)
    writer.leave()
    assert supervisor.wait(20) == 137
    assert is_gone(bundle)


@pytest.mark.parametrize("gate_state", ["open", "closed"])
def test_the_bundle_dies_with_its_supervisor(
    writer: GateWriter, supervise: Supervise, only_child: OnlyChild, eventually: Eventually, gate_state: str
) -> None:
    open_for(writer, 30)
    supervisor = supervise("stubborn")
    bundle = only_child(supervisor.pid)
    if gate_state == "closed":
        writer.close()
        eventually(lambda: is_stopped(bundle))
    supervisor.kill()
    supervisor.wait()
    eventually(lambda: is_gone(bundle))


def test_the_supervisor_dies_with_its_parent(
    writer: GateWriter,
    gate_directory: Path,
    only_child: OnlyChild,
    eventually: Eventually,
    start_program: Callable[..., subprocess.Popen[str]],
) -> None:
    open_for(writer, 30)
    argv = (sys.executable, "-m", "hydro_slurm.gate.supervisor", "--gate-dir", gate_directory, "--bundle", "b1")
    bundle_argv = (sys.executable, BUNDLE, gate_directory, "stubborn")
    parent = start_program("parent.py", *argv, "--grace-s", 0.2, "--", *bundle_argv)
    assert parent.stdout is not None
    supervisor = int(parent.stdout.readline())
    bundle = only_child(supervisor)
    parent.kill()
    eventually(lambda: is_gone(supervisor) and is_gone(bundle))


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (("sh", "-c", "exit 3"), 3),
        (("sh", "-c", "kill -SEGV $$"), 139),
        (("/nowhere/at-all", "x"), 127),
        (("/etc/passwd", "x"), 126),
    ],
)
@pytest.mark.parametrize("gated", [True, False])
def test_exit_status_is_passed_on(
    writer: GateWriter, supervise: Supervise, command: tuple[str, ...], status: int, gated: bool
) -> None:
    open_for(writer, 30)
    assert supervise(*command, gated=gated).wait(20) == status


def test_without_a_gate_signals_are_passed_on(
    supervise: Supervise, only_child: OnlyChild, eventually: Eventually
) -> None:
    supervisor = supervise("obedient", gated=False)
    bundle = only_child(supervisor.pid)
    eventually(lambda: catches(bundle, signal.SIGTERM))
    assert state_of(bundle) == "R"
    supervisor.terminate()
    assert supervisor.wait(20) == 9


def test_without_its_gate_nothing_is_started(supervise: Supervise, tmp_path: Path) -> None:
    supervisor = supervise("touch", tmp_path / "started")
    _, errors = supervisor.communicate(timeout=20)
    assert supervisor.returncode == 69
    assert "no gate at" in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "started").exists()


def test_niceness_lies_on_the_bundle(
    writer: GateWriter, supervise: Supervise, only_child: OnlyChild, eventually: Eventually
) -> None:
    open_for(writer, 30)
    supervisor = supervise("starting", options=("--nice", 10))
    bundle = only_child(supervisor.pid)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, bundle) == min(own + 10, 19)
    eventually(lambda: os.getpriority(os.PRIO_PROCESS, supervisor.pid) == min(own + 5, 19))
