"""Telling processes apart, and what time they had."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from hydro_slurm.gate.process import Preemption, RunTime, is_alive, start_ticks

SPIN = "import os, time\nos.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\nos.nice({nice})\nwhile True: pass"


def test_a_process_is_alive_until_it_has_ended(eventually: Callable[[Callable[[], bool]], None]) -> None:
    process = subprocess.Popen(["sleep", "60"])
    ticks = start_ticks(process.pid)
    assert ticks > 0
    assert is_alive(process.pid, ticks)
    assert not is_alive(process.pid, ticks + 1), "another process that got the same number"
    process.kill()
    eventually(lambda: not is_alive(process.pid, ticks))  # a zombie, not yet waited for
    process.wait()
    assert not is_alive(process.pid, ticks)
    assert start_ticks(process.pid) == 0


@pytest.mark.parametrize("pid", [0, -1, 1 << 40, -(1 << 40)])
def test_numbers_that_no_process_has(pid: int) -> None:
    assert not is_alive(pid, 0)


def test_waiting_for_a_core_is_not_charged() -> None:
    """Two processes on one core, one of them much nicer: it has little of the time, and knows why."""
    spinners = [subprocess.Popen([sys.executable, "-c", SPIN.format(nice=nice)]) for nice in (19, 0)]
    try:
        end_s = time.monotonic() + 20
        preemption = Preemption(str(spinners[0].pid))
        while preemption() < 200_000_000 and time.monotonic() < end_s:
            time.sleep(0.01)
        run_time, began_ns = RunTime(spinners[0].pid), time.monotonic_ns()
        time.sleep(0.5)
        assert run_time.elapsed_ns() < (time.monotonic_ns() - began_ns) / 2
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def test_waiting_for_anything_else_is_charged() -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        run_time, began_ns = RunTime(process.pid), time.monotonic_ns()
        time.sleep(0.1)
        assert run_time.elapsed_ns() > (time.monotonic_ns() - began_ns) / 2
    finally:
        process.kill()
        process.wait()
    assert run_time.elapsed_ns() > 0, "of a process that has ended too"


def test_own_preemption_only_grows() -> None:
    preemption = Preemption()
    before = preemption()
    assert 0 <= before <= preemption()
    assert Preemption(str(1 << 40))() == 0
