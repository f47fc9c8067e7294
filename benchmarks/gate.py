"""Gate latencies: a check, a pause, a resume, and what the host pays for opening and closing.

Host and bundle are processes of their own, on two cores, and then sharing one. The bundle works in quanta of 0.2 ms of
plain computation. Times of both are CLOCK_MONOTONIC, so they can be compared.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from harness import Claim, claim, percentile, write_claims

from hydro_slurm.errors import GateGoneError
from hydro_slurm.gate.bundle_page import BundlePage
from hydro_slurm.gate.layout import PAUSED
from hydro_slurm.gate.quanta import QuantumGate
from hydro_slurm.gate.reader import GateReader
from hydro_slurm.gate.writer import GateWriter

QUANTUM_NS = 200_000
LEASE_NS = 500_000_000
BATCH = 200
P99 = percentile(0.99)

Host = Callable[[GateWriter, Path, int], dict[str, list[float]]]


def quiet_ns(work: Callable[[], object], num_batches: int) -> list[float]:
    """Nanoseconds of one call, as the means of batches."""
    samples = []
    for _ in range(num_batches):
        began_ns = time.perf_counter_ns()
        for _ in range(BATCH):
            work()
        samples.append((time.perf_counter_ns() - began_ns) / BATCH)
    return samples


def measure_calls(directory: Path, num_batches: int) -> list[Claim]:
    """The hot path of the bundle, and the host's side of the page, each alone in one process."""
    with GateWriter.create(directory, stage=0, num_stages=2) as writer:
        reader = GateReader.attach(directory)
        gate = QuantumGate(reader, BundlePage.create(directory, "b1"))
        check_ns: list[float] = []
        may_run_ns: list[float] = []
        for _ in range(10):
            writer.open(time.monotonic_ns() + 60_000_000_000)
            check_ns += quiet_ns(gate.check, num_batches // 10)
            may_run_ns += quiet_ns(lambda: reader.may_run(1_000_000), num_batches // 10)
        deadline_ns = time.monotonic_ns() + 10**12
        open_us = [ns / 1e3 for ns in quiet_ns(lambda: writer.open(deadline_ns), num_batches // 4)]
        close_us = [ns / 1e3 for ns in quiet_ns(writer.close, num_batches // 4)]
        beat_us = [ns / 1e3 for ns in quiet_ns(writer.heartbeat, num_batches // 4)]
    return [
        claim("check_ns.p50", check_ns, unit="ns", better="lower", goal=200),
        claim("check_ns.p99", check_ns, P99, unit="ns", better="lower"),
        claim("may_run_ns.p50", may_run_ns, unit="ns", better="lower"),
        claim("open_us.p50", open_us, unit="us", better="lower"),
        claim("close_us.p50", close_us, unit="us", better="lower"),
        claim("heartbeat_us.p50", beat_us, unit="us", better="lower"),
    ]


def run_bundle(directory: Path, output: Path) -> None:
    """Work in quanta until the gate is gone; leave the moments at which a check returned after a pause."""
    gate = QuantumGate(GateReader.attach(directory), BundlePage.create(directory, "b1"), record_runs=True)
    resumed_ns: list[int] = []
    quanta_ns: list[int] = []
    last_ns = time.monotonic_ns()
    try:
        while True:
            num_runs = len(gate.runs or ())
            gate.check()
            begin_ns = time.monotonic_ns()
            if len(gate.runs or ()) != num_runs or not resumed_ns:
                resumed_ns.append(begin_ns)
            while time.monotonic_ns() < begin_ns + QUANTUM_NS:
                pass
            last_ns = time.monotonic_ns()
            quanta_ns.append(last_ns - begin_ns)
    except GateGoneError:
        output.write_text(json.dumps({"resumed_ns": resumed_ns, "quanta_ns": quanta_ns}))


def alternate(writer: GateWriter, directory: Path, num_rounds: int) -> dict[str, list[float]]:
    """A host that opens, sleeps as in a receive, closes, and sleeps as if another core computed for it."""
    page = BundlePage.attach(directory, "b1")
    generator = random.Random(0)
    found: dict[str, list[float]] = {
        name: [] for name in ("opened_ns", "closed_ns", "paused_ns", "wakeup_us", "open_us")
    }
    for _ in range(num_rounds):
        time.sleep(0.002 + 0.004 * generator.random())
        began_ns = time.monotonic_ns()
        writer.open(began_ns + LEASE_NS)
        found["open_us"].append((time.monotonic_ns() - began_ns) / 1e3)
        found["opened_ns"].append(began_ns)
        wanted_s = 0.006 + 0.008 * generator.random()
        began_ns = time.monotonic_ns()
        time.sleep(wanted_s)
        closed_ns = time.monotonic_ns()
        found["wakeup_us"].append((closed_ns - began_ns) / 1e3 - wanted_s * 1e6)
        writer.close()
        for _ in itertools.repeat(None):
            time.sleep(0.002)
            said = page.snapshot()
            if said is not None and said.state == PAUSED and said.acknowledged_word == writer.word:
                break
        found["closed_ns"].append(closed_ns)
        found["paused_ns"].append(said.heartbeat_ns)
    return found


def measure_pair(directory: Path, cores: Sequence[int], nice: int, num_rounds: int) -> dict[str, list[float]]:
    """A host and a bundle, each pinned to its core."""
    output = directory.parent / "bundle.json"
    with GateWriter.create(directory, stage=0, num_stages=2) as writer:
        child = os.fork()
        if child == 0:
            os.sched_setaffinity(0, {cores[1]})
            os.nice(nice)
            run_bundle(directory, output)
            os._exit(0)
        affinity = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {cores[0]})
        try:
            while not (directory / "bundles" / "b1").exists():
                time.sleep(0.01)
            found = alternate(writer, directory, num_rounds)
            writer.leave()
            os.waitpid(child, 0)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            raise
        finally:
            os.sched_setaffinity(0, affinity)
    said = json.loads(output.read_text())
    resumed_ns = said["resumed_ns"]
    found["resume_us"], found["pause_us"] = [], []
    for opened, closed, paused in zip(found["opened_ns"], found["closed_ns"], found["paused_ns"], strict=True):
        index = bisect.bisect_left(resumed_ns, opened)
        if index < len(resumed_ns) and resumed_ns[index] < closed:
            # Else the bundle did not get a core before the gate was closed again: no latency of the gate's.
            found["resume_us"].append((resumed_ns[index] - opened) / 1e3)
            found["pause_us"].append((paused - closed) / 1e3)
    found["quantum_us"] = [ns / 1e3 for ns in said["quanta_ns"]]
    return found


def pair_claims(prefix: str, found: dict[str, list[float]], *, has_goals: bool) -> list[Claim]:
    """Latencies between two processes."""
    goals = {"pause_us": 2000.0, "resume_us": 300.0}
    claims = []
    for name in ("pause_us", "resume_us"):
        goal = goals[name] if has_goals else None
        claims.append(claim(f"{prefix}{name}.p50", found[name], unit="us", better="lower"))
        claims.append(claim(f"{prefix}{name}.p99", found[name], P99, unit="us", better="lower", goal=goal))
    claims.append(claim(f"{prefix}host_wakeup_us.p50", found["wakeup_us"], unit="us", better="lower"))
    claims.append(claim(f"{prefix}host_wakeup_us.p99", found["wakeup_us"], P99, unit="us", better="lower"))
    claims.append(claim(f"{prefix}open_with_waiter_us.p50", found["open_us"], unit="us", better="lower"))
    claims.append(claim(f"{prefix}quantum_us.p50", found["quantum_us"][:2000], unit="us", better="lower"))
    return claims


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/bench/gate.json"))
    parser.add_argument("--rounds", type=int, default=600, help="pauses and resumes of each pair")
    parser.add_argument("--batches", type=int, default=2000, help="batches of calls")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    base = Path(tempfile.mkdtemp(prefix="hydro-bench-", dir="/dev/shm"))
    try:
        claims = measure_calls(base / "calls", arguments.batches)
        found = measure_pair(base / "two", (cores[0], cores[-1]), 0, arguments.rounds)
        claims += pair_claims("", found, has_goals=True)
        for nice in (0, 19):
            # On one core a closed gate is acknowledged only when the host lets go of the core; what counts there is how
            # soon the host gets it, with the bundle in the middle of a quantum: `host_wakeup_us`.
            found = measure_pair(base / f"one{nice}", (cores[0], cores[0]), nice, arguments.rounds)
            claims += pair_claims(f"one_core.nice{nice}.", found, has_goals=False)
        write_claims(arguments.output, claims)
    finally:
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
