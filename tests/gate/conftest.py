"""Gates on real shared memory, real processes around them, and a clock with a script."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hydro_slurm.clock import ManualClock

PROGRAMS = Path(__file__).parent / "programs"


class ScriptedClock(ManualClock):
    """Runs actions at their times while it is moved; `sleep` moves it to the next action at most."""

    def __init__(self) -> None:
        super().__init__()
        self._script: list[tuple[int, Callable[[], None]]] = []

    def at(self, monotonic_ns: int, action: Callable[[], None]) -> None:
        self._script.append((monotonic_ns, action))
        self._script.sort(key=lambda entry: entry[0])

    def advance(self, seconds: float) -> None:
        end_ns = self.monotonic_ns() + round(seconds * 1e9)
        while self._script and self._script[0][0] <= end_ns:
            when_ns, action = self._script.pop(0)
            super().advance(max(0, when_ns - self.monotonic_ns()) / 1e9)
            action()
        super().advance((end_ns - self.monotonic_ns()) / 1e9)

    def sleep(self, seconds: float) -> None:
        if self._script:
            seconds = min(seconds, max(0.0, (self._script[0][0] - self.monotonic_ns()) / 1e9))
        self.advance(seconds)


@pytest.fixture
def scripted_clock() -> ScriptedClock:
    return ScriptedClock()


@pytest.fixture
def shared_memory() -> Iterator[Path]:
    """A directory on tmpfs that every user may enter."""
    directory = Path(tempfile.mkdtemp(prefix="hydro-test-", dir="/dev/shm"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def gate_directory(shared_memory: Path) -> Path:
    return shared_memory / "node1" / "41" / "0"


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Look again and again until something holds; fail after 20 s."""

    def wait(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
        end_s = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < end_s, "did not happen in time"
            time.sleep(0.002)

    return wait


@pytest.fixture
def start_program() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a script of `programs/` with pipes; whatever is left of it is killed afterwards."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        argv = [*prefix, sys.executable, str(PROGRAMS / name), *map(str, arguments)]
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
