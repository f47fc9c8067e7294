"""The simulator: speed and memory on long traces, against SimPy, and its two answers that can be checked.

Every measurement runs in a process of its own, on one core, so that times and peaks of memory are its own. Without
TRACES, which says where the public traces lie, a generated trace of Philly's size stands in for it. The validation
records a run on a private Slurm cluster first (a few minutes); where no Slurm is installed it takes the recording that
comes with the tests.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Claim, claim, write_claims

from hydro_sim import validation
from hydro_sim.engine import Engine
from hydro_sim.nodes import NodePool
from hydro_sim.queueing import Jobs, SchedulerConfig
from hydro_sim.scenario import ScenarioFile, read_scenario
from hydro_sim.simulation import build
from hydro_sim.traces import Trace, check_plausible, generate_trace, load_philly
from hydro_sim.variants import Point, run_point
from hydro_slurm.testbed.machines import missing_programs

ROOT = Path(__file__).resolve().parent.parent
OSDI23 = ROOT / "sim" / "scenarios" / "hydro_osdi23.toml"
OVERLAY = ROOT / "sim" / "scenarios" / "overlay.toml"
RECORDING = ROOT / "tests" / "sim" / "recordings" / "testbed_run.json"

PHILLY_JOBS, PHILLY_NODES = 82_247, 64
MILLION_NODES, DEVICES_PER_NODE = 10_000, 8


def philly() -> Trace:
    """The whole trace, read and checked; a generated one of its size where TRACES is not set."""
    folder = os.environ.get("TRACES")
    if folder is None:
        return generate_trace(PHILLY_JOBS, PHILLY_NODES * DEVICES_PER_NODE, load=0.73, median_s=1700.0)
    trace = load_philly(Path(folder) / "philly.csv")
    check_plausible(trace)
    return trace


def columns(trace: Trace) -> Jobs:
    """The jobs of a trace; limits are the durations."""
    start_s = trace.jobs[0].submit_s
    durations = [job.duration_s for job in trace.jobs]
    submits = [job.submit_s - start_s for job in trace.jobs]
    return Jobs(submits, durations, list(durations), [job.num_devices for job in trace.jobs])


def replay(trace: Trace, num_nodes: int, policy: str) -> tuple[float, Engine]:
    """Run the base load; returns seconds and the engine."""
    began_s = time.perf_counter()
    jobs = columns(trace)
    engine = Engine(jobs, [0] * len(jobs), [NodePool(num_nodes, DEVICES_PER_NODE)], SchedulerConfig(policy=policy))
    engine.run()
    return time.perf_counter() - began_s, engine


def measure_philly_base() -> dict[str, float]:
    """Read the trace and replay it with backfill."""
    began_s = time.perf_counter()
    trace = philly()
    read_s = time.perf_counter() - began_s
    run_s, engine = replay(trace, PHILLY_NODES, "backfill")
    return {"s": read_s + run_s, "run_s": run_s, "events": engine.num_events}


def measure_philly_overlay() -> dict[str, float]:
    """The same base load with 50 hosts, 200 studies and the real policy."""
    began_s = time.perf_counter()
    file = read_scenario(OVERLAY)
    simulation = build(file.scenario(), file.folder, philly())
    simulation.run()
    ended = sum(study.end_s >= 0 for study in simulation.studies)
    return {
        "s": time.perf_counter() - began_s,
        "decisions": simulation.overlay.decider.num_decisions,
        "hosts": len(simulation.hosts),
        "studies": ended,
    }


def measure_generated(num_jobs: int) -> dict[str, float]:
    """A generated trace on 10,000 nodes; making the trace is not counted."""
    trace = generate_trace(num_jobs, MILLION_NODES * DEVICES_PER_NODE, load=0.95)
    gc.collect()
    run_s, engine = replay(trace, MILLION_NODES, "backfill")
    return {"s": run_s, "events": engine.num_events}


def measure_fifo() -> dict[str, float]:
    """The base load first come, first served, as SimPy does it below."""
    run_s, engine = replay(philly(), PHILLY_NODES, "fifo")
    return {"s": run_s, "events": engine.num_events}


def measure_simpy() -> dict[str, float]:
    """The same in SimPy: a process per job, and a container of devices. It knows no nodes, so it does a little less."""
    import simpy

    trace = philly()
    began_s = time.perf_counter()
    start_s = trace.jobs[0].submit_s
    environment = simpy.Environment()
    devices = simpy.Container(environment, PHILLY_NODES * DEVICES_PER_NODE, init=PHILLY_NODES * DEVICES_PER_NODE)

    def run(job: Any) -> Any:
        yield devices.get(job.num_devices)
        yield environment.timeout(job.duration_s)
        yield devices.put(job.num_devices)

    def arrive() -> Any:
        for job in trace.jobs:
            yield environment.timeout(job.submit_s - start_s - environment.now)
            environment.process(run(job))

    environment.process(arrive())
    environment.run()
    return {"s": time.perf_counter() - began_s, "events": 2.0 * len(trace.jobs)}


MEASUREMENTS: dict[str, Callable[[], dict[str, float]]] = {
    "philly_base": measure_philly_base,
    "philly_overlay": measure_philly_overlay,
    "hundred_thousand": lambda: measure_generated(100_000),
    "million": lambda: measure_generated(1_000_000),
    "fifo": measure_fifo,
    "simpy": measure_simpy,
}


def in_own_process(name: str) -> dict[str, float]:
    """Run one measurement in a fresh process; adds its peak memory."""
    command = [sys.executable, __file__, "--measure", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {done.stdout.strip()}", flush=True)
    return found


def measure_speed(rounds: int) -> list[Claim]:
    """Times and memory; what is compared is measured in turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in MEASUREMENTS}
    for _ in range(rounds):
        for name in ("philly_base", "fifo", "simpy", "hundred_thousand"):
            found[name].append(in_own_process(name))
    for name in ("million", "hundred_thousand", "philly_overlay"):
        found[name].append(in_own_process(name))
    base, million = found["philly_base"], found["million"]
    small = sorted(run["s"] / run["events"] for run in found["hundred_thousand"])[len(found["hundred_thousand"]) // 2]
    ratios = [slow["s"] / fast["s"] for fast, slow in zip(found["fifo"], found["simpy"], strict=True)]
    return [
        claim("philly_base_s", [run["s"] for run in base], unit="s", better="lower", goal=10),
        claim("philly_overlay_s", [run["s"] for run in found["philly_overlay"]], unit="s", better="lower", goal=60),
        claim("million_jobs_s", [run["s"] for run in million], unit="s", better="lower", goal=120),
        claim("million_jobs_gib", [run["peak_gib"] for run in million], unit="GiB", better="lower", goal=4),
        claim("growth", [run["s"] / run["events"] / small for run in million], unit="x", better="lower", goal=1.5),
        claim("events_per_s", [run["events"] / run["run_s"] for run in base], unit="1/s", better="higher"),
        claim("vs_simpy", ratios, unit="x", better="higher", goal=1),
    ]


def measure_reduction() -> list[Claim]:
    """The scenario of Hydro's simulated result; the authors say 2.7."""
    file: ScenarioFile = read_scenario(OSDI23)
    found = run_point(file.path, Point("scenario", ()))
    return [claim("hydro_osdi23.makespan_reduction", [found["reduction"]], unit="x", better="higher")]


def measure_validation(folder: Path) -> list[Claim]:
    """Record a run on a private cluster, replay it, compare."""
    recording = RECORDING
    if missing_programs():
        print("no Slurm here: the validation replays the recording of the tests", flush=True)
    else:
        from testbed_run import record_run

        recording = record_run(folder / "testbed_run.json")
    found = validation.validate(recording, folder / "validation")
    print(json.dumps(found), flush=True)
    error = abs(found["makespan_error"])
    return [claim("validation.makespan_error", [error], unit="fraction", better="lower", goal=0.1)]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/bench/sim.json"))
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of the short measurements")
    parser.add_argument("--measure", choices=sorted(MEASUREMENTS), help="one measurement, printed as JSON")
    arguments = parser.parse_args()
    if arguments.measure:
        found = MEASUREMENTS[arguments.measure]()
        found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
        print(json.dumps(found))
        return
    claims = measure_speed(arguments.rounds) + measure_reduction() + measure_validation(arguments.output.parent / "sim")
    write_claims(arguments.output, claims)


if __name__ == "__main__":
    main()
