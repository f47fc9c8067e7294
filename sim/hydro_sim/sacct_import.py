"""From an admin's own `sacct` output to a scenario that runs as it is."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from hydro_sim.scenario import read_scenario
from hydro_sim.traces import Trace, TraceJob, check_plausible, load_sacct
from hydro_sim.traces.sacct import COMMAND
from hydro_slurm.errors import ConfigError
from hydro_slurm.formats import write_text_atomic

__all__ = ["COMMAND", "import_sacct"]

MIN_HOST_DEVICES, MIN_HOST_HOURS = 16, 6.0
"""Jobs of this size are taken for training jobs that could be hosts; the scenario says so and can be changed."""

_HOSTS = """
# Jobs of the trace with at least this many devices and hours are taken to be pipeline-parallel hosts. ASSUMED: sacct
# does not say which jobs are; ask their owners, and put their stages and microbatches here.
[[hosts]]
name = "large"
from_trace_devices = {devices}
from_trace_hours = {hours}
pipeline = {{ num_stages = 4, num_microbatches = 16, forward_s = 0.1, backward_s = 0.2 }}
slowdown = 0.0
slowdown_source = "assumed; the guard measures it and holds it below its bound"
"""

_STUDIES = """
# What researchers would bring. ASSUMED: put your own numbers of studies, trials and steps here, and a profile by
# `python -m hydro_trials profile FILE`.
[[studies]]
name = "sweep"
user = "researcher-{{n}}"
count = {count}
over_h = {over_h}
exclusive_devices = 1
trials = 64
steps = 20000
rungs = [0.1, 0.3, 1.0]
eta = 3
curve = [[1, 20.0], [4, 60.0], [16, 120.0], [32, 130.0]]
max_lanes = 32
"""


def import_sacct(file: Path, folder: Path, zone: str, devices_per_node: int, nodes: Mapping[str, int]) -> list[str]:
    """Check a `sacct` export and make a scenario of it.

    Args:
        file: Output of `COMMAND`.
        folder: Gets `scenario.toml` and a copy of the file.
        zone: Time zone of its times.
        devices_per_node: Devices of every node.
        nodes: Nodes by partition; where they are not given, the most devices that jobs held at a time are taken.

    Returns:
        What was found, as lines of text.

    Raises:
        TraceError: The file does not pass its checks.
        ConfigError: The folder holds a scenario already.
    """
    trace = load_sacct(file, zone=zone)
    check_plausible(trace)
    target = folder / "scenario.toml"
    if target.exists():
        raise ConfigError(f"{target} exists; choose another --output, or remove it")
    partitions = sorted({job.partition for job in trace.jobs})
    unknown = sorted(set(nodes) - set(partitions))
    if unknown:
        raise ConfigError(f"--nodes {unknown[0]}: no job ran there; partitions: {', '.join(partitions)}")
    peaks = _peaks(trace)
    sizes = {name: nodes.get(name) or math.ceil(peaks[name] / devices_per_node) for name in partitions}
    candidates = [job for job in trace.jobs if _may_host(job)]
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, folder / file.name)
    write_text_atomic(target, _scenario_text(file.name, zone, sizes, devices_per_node, trace, bool(candidates)))
    read_scenario(target)
    lines = trace.describe()
    for name in partitions:
        origin = "given" if name in nodes else f"a guess: jobs held up to {peaks[name]} devices at a time"
        lines.append(f"partition {name}: {sizes[name]} nodes of {devices_per_node} devices ({origin})")
    held_h = sum(job.duration_s * job.num_devices for job in candidates) / 3600
    lines.append(
        f"jobs that could be hosts (from {MIN_HOST_DEVICES} devices and {MIN_HOST_HOURS:g} h on): {len(candidates)}, "
        f"with {held_h:,.0f} device hours"
    )
    lines.append(f"written to {target}; look through what it marks as ASSUMED, then: hydro-sim compare {target}")
    return lines


def _may_host(job: TraceJob) -> bool:
    return job.num_devices >= MIN_HOST_DEVICES and job.duration_s >= MIN_HOST_HOURS * 3600


def _peaks(trace: Trace) -> dict[str, int]:
    """Most devices that were held at a time, by partition, from the recorded start and end times."""
    changes: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
    for job in trace.jobs:
        start_s = job.submit_s + (job.waited_s or 0.0)
        changes[job.partition] += [(start_s, job.num_devices), (start_s + job.duration_s, -job.num_devices)]
    peaks = {}
    for name, moments in changes.items():
        level = peak = 0
        for _, change in sorted(moments):
            level += change
            peak = max(peak, level)
        peaks[name] = peak
    return peaks


def _scenario_text(
    file: str, zone: str, sizes: Mapping[str, int], devices_per_node: int, trace: Trace, has_hosts: bool
) -> str:
    days = trace.span_s / 86400
    parts = [
        f"# Made from {file} by hydro-sim import. Everything that sacct does not say is marked as ASSUMED.",
        f"name = {json.dumps(f'history of {file}')}",
        f'description = "Jobs of {days:.1f} days, with and without bubble sharing."',
        "",
    ]
    for name, count in sizes.items():
        parts += [
            "[[partitions]]",
            f"name = {json.dumps(name)}",
            f"nodes = {count}",
            f"devices_per_node = {devices_per_node}",
            "",
        ]
    parts += ["[trace]", 'format = "sacct"', f"file = {json.dumps(file)}", f"time_zone = {json.dumps(zone)}", ""]
    parts += ["[scheduler]", 'policy = "priority"  # multifactor, approximated by age and past usage']
    text = "\n".join(parts) + "\n"
    if has_hosts:
        text += _HOSTS.format(devices=MIN_HOST_DEVICES, hours=MIN_HOST_HOURS)
    return text + _STUDIES.format(count=max(round(days), 1), over_h=round(days * 24, 1))
