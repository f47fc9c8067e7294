"""Hosts and readers as processes of their own: waking, and pages that go away under their readers."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hydro_slurm.gate import futex
from hydro_slurm.gate.reader import SLICE_S, GateReader
from hydro_slurm.gate.writer import GateWriter

Start = Callable[..., "subprocess.Popen[str]"]
NOBODY = 65534


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def num_switches(pid: int) -> int:
    """How often a process has gone to sleep."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("voluntary_ctxt_switches:")[1].split()[0])


def is_asleep_in_futex(pid: int) -> bool:
    """Whether a process sleeps in the system call that its readers sleep in."""
    return Path(f"/proc/{pid}/syscall").read_text().split()[0] == str(futex._NUMBER)


def shrink(page: Path) -> None:
    os.truncate(page, 0)


def scramble(page: Path) -> None:
    with page.open("r+b") as file:
        file.write(os.urandom(4096))


def delete(page: Path) -> None:
    page.unlink()


DAMAGES = pytest.mark.parametrize("damage", [shrink, scramble, delete])


def test_opening_wakes_a_waiter(
    gate_directory: Path, start_program: Start, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    latencies_s = []
    with GateWriter.create(gate_directory, stage=0, num_stages=2) as writer:
        process = start_program("waiter.py", gate_directory)
        assert line_of(process) == "ready"
        for _ in range(20):
            tell(process, "wait")
            eventually(lambda: is_asleep_in_futex(process.pid))
            began_s = time.monotonic()
            writer.open(time.monotonic_ns() + 10**10)
            assert line_of(process) == "open"
            latencies_s.append(time.monotonic() - began_s)
            writer.close()
        tell(process, "wait")
        eventually(lambda: is_asleep_in_futex(process.pid))
        writer.leave()
        assert line_of(process) == "gone"
    assert min(latencies_s) < SLICE_S / 10, "woken, and not found at the end of a slice"


def test_another_user_can_wait_and_cannot_write(
    gate_directory: Path, start_program: Start, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    with GateWriter.create(gate_directory, stage=0, num_stages=2) as writer:
        process = start_program("waiter.py", gate_directory, NOBODY)
        assert line_of(process) == "ready", process.communicate()
        tell(process, "wait")
        eventually(lambda: is_asleep_in_futex(process.pid))
        writer.open(time.monotonic_ns() + 10**10)
        assert line_of(process) == "open"
        writer.close()
        tell(process, "wait")
        writer.leave()
        assert line_of(process) == "gone"


def test_closing_does_not_wake_who_waits_for_open(
    gate_directory: Path, start_program: Start, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    """A bundle sleeps on its host's core: it must not be woken when the host wants that core."""
    with GateWriter.create(gate_directory, stage=0, num_stages=2) as writer:
        process = start_program("waiter.py", gate_directory)
        assert line_of(process) == "ready"
        tell(process, "wait")
        eventually(lambda: is_asleep_in_futex(process.pid))
        before = num_switches(process.pid)
        began_s = time.monotonic()
        for _ in range(200):
            writer.close()
        slices = (time.monotonic() - began_s) / 0.25 + 2
        assert num_switches(process.pid) - before <= slices


@DAMAGES
def test_page_damaged_under_a_blocked_reader(
    gate_directory: Path,
    start_program: Start,
    eventually: Callable[[Callable[[], bool]], None],
    damage: Callable[[Path], None],
) -> None:
    with GateWriter.create(gate_directory, stage=0, num_stages=2):
        process = start_program("waiter.py", gate_directory)
        assert line_of(process) == "ready"
        tell(process, "wait")
        eventually(lambda: is_asleep_in_futex(process.pid))
        damage(gate_directory / "page")
        assert line_of(process) == "gone"


def test_host_killed_under_a_blocked_reader(gate_directory: Path, start_program: Start) -> None:
    host = start_program("host.py", gate_directory)
    assert line_of(host) == "ready"
    waiter = start_program("waiter.py", gate_directory)
    assert line_of(waiter) == "ready"
    tell(waiter, "wait")
    began_s = time.monotonic()
    host.kill()
    host.wait()
    assert line_of(waiter) == "gone"
    assert time.monotonic() - began_s < 4.5, "noticed by its process, not by its heartbeat"


def damage_gates_of_a_running_reader(
    directory: Path, start_program: Start, kind: str, damage: Callable[[Path], None]
) -> subprocess.Popen[str]:
    """Many times, at ever other moments, while the reader loads from the open page a million times a second."""
    rounds = 60
    writers = [GateWriter.create(directory / str(n), stage=0, num_stages=2) for n in range(rounds + 1)]
    writers[0].open(time.monotonic_ns() + 5 * 10**9)
    process = start_program("spinner.py", directory, rounds, kind)
    for number in range(rounds):
        if line_of(process) != str(number):
            break
        writers[number + 1].open(time.monotonic_ns() + 5 * 10**9)
        end_ns = time.monotonic_ns() + 17_000 * number
        while time.monotonic_ns() < end_ns:
            pass
        damage(directory / str(number) / "page")
        # A lease outlives its page where the word still says so: the host's next word is what ends it.
        writers[number].close()
    process.wait(20)
    return process


@DAMAGES
def test_page_damaged_under_a_running_reader(
    shared_memory: Path, start_program: Start, damage: Callable[[Path], None]
) -> None:
    process = damage_gates_of_a_running_reader(shared_memory, start_program, "guarded", damage)
    assert process.stderr is not None
    assert process.returncode == 0, process.stderr.read()
    assert line_of(process) == "done"


def test_without_the_guard_a_shrunk_page_kills_its_reader(shared_memory: Path, start_program: Start) -> None:
    """Shows that the test above tests something. Whether a load meets the damage is chance."""
    for attempt in range(20):
        directory = shared_memory / f"attempt-{attempt}"
        directory.mkdir()
        process = damage_gates_of_a_running_reader(directory, start_program, "unguarded", shrink)
        if process.returncode == -signal.SIGBUS:
            return
    pytest.fail("no load of 20 times 60 gates met a shrunk page")


@pytest.mark.parametrize("handler", ["default", "faulthandler"])
def test_other_faults_still_kill(gate_directory: Path, start_program: Start, handler: str) -> None:
    with GateWriter.create(gate_directory, stage=0, num_stages=2):
        process = start_program("foreign_fault.py", gate_directory, handler)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == -signal.SIGBUS
        assert ("Bus error" in errors) == (handler == "faulthandler")


def test_wait_times_out(gate_directory: Path) -> None:
    with GateWriter.create(gate_directory, stage=0, num_stages=2) as writer:
        reader = GateReader.attach(gate_directory)
        assert reader.wait_open(0, timeout_s=0.05) == "timeout"
        assert reader.wait_change(reader.snapshot().word, timeout_s=0.05) == "closed"
        writer.open(time.monotonic_ns() + 10**8)
        assert reader.wait_open(10**10, timeout_s=0.05) == "timeout", "the lease is too short"
        assert reader.wait_change(0, timeout_s=60) == "open", "the word is another already"


def test_waiting_without_futexes(gate_directory: Path, monkeypatch: pytest.MonkeyPatch, start_program: Start) -> None:
    monkeypatch.setattr("hydro_slurm.gate.futex._NUMBER", -1)
    host = start_program("host.py", gate_directory)
    assert line_of(host) == "ready"
    reader = GateReader.attach(gate_directory)
    assert reader.wait_open(0, timeout_s=0.01) == "timeout"
    tell(host, "open 30")
    assert reader.wait_open(0, timeout_s=20) == "open"
