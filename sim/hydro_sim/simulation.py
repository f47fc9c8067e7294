"""One simulation: a scenario and its trace put together, run, and handed over as results."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hydro_sim.engine import Engine
from hydro_sim.failures import Failures
from hydro_sim.host_jobs import HostJob, is_host, make_hosts
from hydro_sim.nodes import NodePool
from hydro_sim.overlay import Overlay
from hydro_sim.profiles import sizing_of, target_sizing
from hydro_sim.queueing import Jobs
from hydro_sim.settings import Scenario, TraceConfig
from hydro_sim.studies import Study, make_studies
from hydro_sim.traces import (
    Trace,
    TraceJob,
    check_plausible,
    generate_trace,
    load_helios,
    load_mapped,
    load_philly,
    load_sacct,
)
from hydro_slurm.errors import TraceError

NUM_SLICES = 200
"""How often a run comes up for air: to show its progress, and to notice Ctrl-C between two events."""


@dataclass(slots=True)
class Simulation:
    """Everything that a run has, before and after."""

    scenario: Scenario
    trace: Trace | None
    base_jobs: list[TraceJob]
    """By job number; jobs of hosts and studies come after them."""
    too_large: int
    """Jobs of the trace that no partition can hold."""
    engine: Engine
    overlay: Overlay
    failures: Failures
    interrupted: bool = False

    @property
    def hosts(self) -> list[HostJob]:
        return self.overlay.hosts

    @property
    def studies(self) -> list[Study]:
        return list(self.overlay.studies.values())

    def run(self, progress: Callable[[float, str], None] | None = None) -> None:
        """Run to the end; Ctrl-C ends it early and keeps what is done.

        Args:
            progress: Called now and then with the share that is done, as far as that is known, and a sentence.
        """
        limit_s = self.scenario.until_h * 3600 or float("inf")
        submit_s = self.engine.jobs.submit_s
        last_known_s = max(submit_s[len(self.base_jobs) - 1] if self.base_jobs else 0.0, self._overlay_end_s())
        step_s = max(min(last_known_s, limit_s) / NUM_SLICES, 1.0)
        try:
            until_s = step_s
            while True:
                self.engine.run(min(until_s, limit_s))
                if progress is not None:
                    ended = sum(study.end_s >= 0 for study in self.studies)
                    progress(
                        min(until_s / max(last_known_s, 1.0), 1.0),
                        f"day {self.engine.now_s / 86400:.1f}, {self.engine.num_events} events, "
                        f"{ended} of {len(self.studies)} studies ended",
                    )
                next_s = self.engine.next_s
                if next_s == float("inf") or next_s > limit_s:
                    break
                until_s = max(until_s, next_s) + step_s
        except KeyboardInterrupt:
            self.interrupted = True
        if limit_s != float("inf") and not self.interrupted:
            self.engine.now_s = max(self.engine.now_s, limit_s)
        self.overlay.close()

    def _overlay_end_s(self) -> float:
        ends = [host.submit_s + host.duration_s for host in self.hosts]
        return max([*ends, *(study.submit_s for study in self.studies)], default=0.0)


def load_trace(config: TraceConfig, folder: Path, num_devices: int, seed: int) -> Trace | None:
    """The base load of a scenario.

    Raises:
        TraceError: The file is not found or does not pass its checks.
    """
    if config.format == "none":
        return None
    if config.format == "generated":
        return generate_trace(config.jobs, num_devices, load=config.load, seed=seed)
    path = find_trace(config.file, folder)
    if config.format == "philly":
        trace = load_philly(path)
    elif config.format == "helios":
        trace = load_helios(path)
    elif config.format == "sacct":
        trace = load_sacct(path, zone=config.time_zone)
    else:
        assert config.columns is not None  # checked by TraceConfig
        trace = load_mapped(path, config.columns, zone=config.time_zone)
    check_plausible(trace)
    return trace


def find_trace(name: str, folder: Path) -> Path:
    """A trace's file: as it is named, beside the scenario, or in the folder that TRACES names."""
    candidates = [folder / name]
    if os.environ.get("TRACES"):
        candidates.append(Path(os.environ["TRACES"]) / name)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    looked = " and ".join(str(candidate.parent) for candidate in candidates)
    raise TraceError(f"no trace is called {name} in {looked}; set TRACES to the folder that holds it")


def build(scenario: Scenario, folder: Path, trace: Trace | None = None) -> Simulation:
    """Put a simulation together.

    Args:
        scenario: What to simulate.
        folder: Where its relative paths start.
        trace: The base load, where it has been loaded already.
    """
    num_devices = sum(partition.nodes * partition.devices_per_node for partition in scenario.partitions)
    if trace is None:
        trace = load_trace(scenario.trace, folder, num_devices, scenario.seed)
    names = {partition.name: index for index, partition in enumerate(scenario.partitions)}
    sizes = [partition.nodes * partition.devices_per_node for partition in scenario.partitions]
    base_jobs: list[TraceJob] = []
    partition_of: list[int] = []
    traced_hosts: list[tuple[TraceJob, float, int]] = []
    too_large = 0
    jobs_of_trace = [] if trace is None else trace.jobs[: scenario.trace.max_jobs or None]
    start_s = jobs_of_trace[0].submit_s if jobs_of_trace else 0.0
    for job in jobs_of_trace:
        partition = names.get(job.partition, 0)
        if job.num_devices > sizes[partition]:
            too_large += 1
            continue
        if any(is_host(job, config) for config in scenario.hosts):
            traced_hosts.append((job, job.submit_s - start_s, partition))
            continue
        base_jobs.append(job)
        partition_of.append(partition)
    usage: Counter[str] = Counter()
    head_start_s = []
    for job in base_jobs:
        # Multifactor priority, approximated: who has asked for more device time so far waits longer, up to a day.
        head_start_s.append(-min(usage[job.user] / (sizes[0] * 3600.0), 1.0) * 86400.0)
        usage[job.user] += round(job.duration_s * job.num_devices)
    jobs = Jobs(
        [job.submit_s - start_s for job in base_jobs],
        [job.duration_s for job in base_jobs],
        [max(job.limit_s or job.duration_s, job.duration_s) for job in base_jobs],
        [job.num_devices for job in base_jobs],
        head_start_s,
    )
    pools = [NodePool(partition.nodes, partition.devices_per_node) for partition in scenario.partitions]
    engine = Engine(jobs, partition_of, pools, scenario.scheduler)
    studies = []
    for position, config in enumerate(scenario.studies):
        partition = names[config.partition] if config.partition else 0
        seed = f"{scenario.seed} studies {position}"
        studies += make_studies(config, sizing_of(config, folder), target_sizing(config), partition, seed)
    overlay = Overlay(engine, scenario, make_hosts(scenario, folder, traced_hosts), studies)
    failures = Failures(engine, overlay, scenario.failures, f"{scenario.seed} failures")
    return Simulation(scenario, trace, base_jobs, too_large, engine, overlay, failures)
