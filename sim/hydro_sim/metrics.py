"""What a simulation has shown: tables of studies, hosts, users and device types, and a summary."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from hydro_sim.host_jobs import HostJob
from hydro_sim.simulation import Simulation
from hydro_sim.studies import Study

Row = dict[str, Any]


def quantiles(values: list[float]) -> dict[str, float]:
    """Mean, median, p90 and largest; zeros for none."""
    if not values:
        return {"mean": 0.0, "p50": 0.0, "p90": 0.0, "max": 0.0}
    ordered = sorted(values)
    return {
        "mean": statistics.fmean(ordered),
        "p50": ordered[(len(ordered) - 1) // 2],
        "p90": ordered[-(-9 * len(ordered) // 10) - 1],
        "max": ordered[-1],
    }


def study_rows(simulation: Simulation) -> list[Row]:
    """One row per study. Times in hours; what has not happened is empty."""
    now_s = simulation.engine.now_s
    return [
        {
            "study": study.id,
            "user": study.user,
            "submit_h": _h(study.submit_s),
            "queueing_delay_h": _h(study.start_s - study.submit_s) if study.start_s >= 0 else "",
            "jct_h": _h(study.end_s - study.submit_s) if 0 <= study.end_s <= now_s else "",
            "trials": len(study.trials),
            "trials_ended": study.num_ended,
            "verified": sum(trial.end_s >= 0 for trial in study.verified.values()),
            "bundles": study.num_bundles,
            "lane_steps": round(study.lane_steps, 3),
            "bubble_device_h": _h(study.bubble_device_s),
            "exclusive_device_h": _h(_exclusive_s(simulation, study)),
        }
        for study in simulation.studies
    ]


def host_rows(simulation: Simulation) -> list[Row]:
    """One row per host job."""
    return [
        {
            "host": host.id,
            "user": host.user,
            "devices": host.devices,
            "stages": len(host.offers),
            "submit_h": _h(host.submit_s),
            "start_h": _h(host.first_start_s) if host.first_start_s >= 0 else "",
            "end_h": _h(host.end_s) if host.end_s >= 0 else "",
            "offered_h": _h(host.offered_s),
            "failures": host.num_failures,
            "bubble_ratio": round(statistics.fmean(offer.idle_share for offer in host.offers), 6),
            "usable_share": round(statistics.fmean(offer.usable_s_per_s for offer in host.offers), 6),
            "throughput_share": round(statistics.fmean(offer.throughput_share for offer in host.offers), 6),
            "bubbles_from": host.offers[0].source,
            "slowdown_assumed": host.config.slowdown,
            "slowdown_from": host.config.slowdown_source,
            "refused": host.refusal,
        }
        for host in simulation.hosts
    ]


def bundle_rows(simulation: Simulation) -> list[Row]:
    """One row per bundle that has ended."""
    return [
        {
            "bundle": record.id,
            "study": record.study,
            "purpose": record.purpose,
            "slot": record.slot,
            "host": record.host,
            "start_h": _h(record.start_s),
            "end_h": _h(record.end_s),
            "lanes": record.num_lanes,
            "trials": record.num_trials,
            "lane_steps": round(record.lane_steps, 3),
        }
        for record in simulation.overlay.running.records
    ]


def user_rows(simulation: Simulation) -> list[Row]:
    """One row per user: jobs, device hours, waiting."""
    device_s: defaultdict[str, float] = defaultdict(float)
    waits: defaultdict[str, list[float]] = defaultdict(list)
    bubble_s: defaultdict[str, float] = defaultdict(float)
    jobs = simulation.engine.jobs
    for index, job in enumerate(simulation.base_jobs):
        if jobs.first_start_s[index] >= 0:
            device_s[job.user] += _ran_s(simulation, index) * job.num_devices
            waits[job.user].append(jobs.first_start_s[index] - jobs.submit_s[index])
    for host in simulation.hosts:
        device_s[host.user] += _host_run_s(simulation, host) * host.devices
        if host.first_start_s >= 0:
            waits[host.user].append(host.first_start_s - host.submit_s)
    for study in simulation.studies:
        device_s[study.user] += _exclusive_s(simulation, study)
        bubble_s[study.user] += study.bubble_device_s
        if study.start_s >= 0:
            waits[study.user].append(study.start_s - study.submit_s)
    return [
        {
            "user": user,
            "started": len(waits[user]),
            "device_h": _h(device_s[user]),
            "bubble_device_h": _h(bubble_s[user]),
            "mean_queueing_delay_h": _h(statistics.fmean(waits[user])) if waits[user] else "",
        }
        for user in sorted({*device_s, *waits, *bubble_s})
    ]


def partition_rows(simulation: Simulation) -> list[Row]:
    """One row per partition (one device type each): utilisation without and with the work in bubbles."""
    end_s = simulation.engine.now_s or 1.0
    rows = []
    for index, partition in enumerate(simulation.scenario.partitions):
        total_s = partition.nodes * partition.devices_per_node * end_s
        held_s = simulation.engine.partitions[index].device_s_until(end_s)
        hosts = [host for host in simulation.hosts if host.partition == index]
        idle_s = sum(_host_run_s(simulation, host) * host.devices * _mean_idle(host) for host in hosts)
        names = {host.id for host in hosts}
        harvested_s = _harvested_s(simulation, names)
        rows.append(
            {
                "partition": partition.name,
                "device_type": partition.device_type,
                "devices": partition.nodes * partition.devices_per_node,
                "device_h": _h(total_s),
                "held_device_h": _h(held_s),
                "bubble_device_h": _h(idle_s),
                "harvested_device_h": _h(harvested_s),
                "allocated": round(held_s / total_s, 6),
                "computing_before": round((held_s - idle_s) / total_s, 6),
                "computing_after": round((held_s - idle_s + harvested_s) / total_s, 6),
            }
        )
    return rows


def summary(simulation: Simulation) -> Row:
    """The figures of one run."""
    studies, jobs = simulation.studies, simulation.engine.jobs
    now_s = simulation.engine.now_s
    ended = [study for study in studies if 0 <= study.end_s <= now_s]
    started = [i for i in range(len(simulation.base_jobs)) if jobs.first_start_s[i] >= 0]
    waits_s = [jobs.first_start_s[i] - jobs.submit_s[i] for i in started]
    first_s = min((study.submit_s for study in studies), default=0.0)
    return {
        "scenario": simulation.scenario.name,
        "seed": simulation.scenario.seed,
        "trace": simulation.trace.origin if simulation.trace else "none",
        "trace_synthetic": bool(simulation.trace and simulation.trace.synthetic),
        "hosts_synthetic": any(not host.config.from_trace_devices for host in simulation.hosts),
        "interrupted": simulation.interrupted,
        "simulated_h": _h(now_s),
        "events": simulation.engine.num_events,
        "decisions": simulation.overlay.decider.num_decisions,
        "base_jobs": len(simulation.base_jobs),
        "base_jobs_started": len(started),
        "base_jobs_too_large": simulation.too_large,
        "base_queueing_delay_h": {name: _h(value) for name, value in quantiles(waits_s).items()},
        "base_recorded_queueing_delay_h": {
            name: _h(value)
            for name, value in quantiles([j.waited_s for j in simulation.base_jobs if j.waited_s is not None]).items()
        },
        "studies": len(studies),
        "studies_ended": len(ended),
        "makespan_h": _h(max(study.end_s for study in ended) - first_s)
        if ended and len(ended) == len(studies)
        else None,
        "jct_h": {name: _h(v) for name, v in quantiles([s.end_s - s.submit_s for s in ended]).items()},
        "queueing_delay_h": {
            name: _h(v) for name, v in quantiles([s.start_s - s.submit_s for s in studies if s.start_s >= 0]).items()
        },
        "harvested_device_h": _h(_harvested_s(simulation, {host.id for host in simulation.hosts})),
        "bundles": len(simulation.overlay.running.records),
        "moves": dict(sorted(simulation.overlay.running.num_moves.items())),
        "node_failures": simulation.failures.num_node_failures,
        "host_failures": simulation.failures.num_host_failures,
        "host_slowdown_assumed": max((host.config.slowdown for host in simulation.hosts), default=0.0),
    }


def _h(seconds: float) -> float:
    return round(seconds / 3600, 6)


def _ran_s(simulation: Simulation, job: int) -> float:
    jobs = simulation.engine.jobs
    if jobs.start_s[job] < 0:
        return 0.0
    return max(min(jobs.end_s[job], simulation.engine.now_s) - jobs.start_s[job], 0.0)


def _host_run_s(simulation: Simulation, host: HostJob) -> float:
    """Time in which a host has held its devices, up to now."""
    running = host.start_s >= 0 and host.end_s < 0
    return host.run_s + (simulation.engine.now_s - host.start_s if running else 0.0)


def _exclusive_s(simulation: Simulation, study: Study) -> float:
    since_s = simulation.engine.now_s - simulation.engine.jobs.start_s[study.job] if study.own_slots else 0.0
    return study.exclusive_device_s + study.own_slots * since_s


def _harvested_s(simulation: Simulation, hosts: set[str]) -> float:
    """Work in the bubbles of these hosts, as seconds of a device of its own."""
    return sum(record.device_s for record in simulation.overlay.running.records if record.host in hosts)


def _mean_idle(host: HostJob) -> float:
    return statistics.fmean(offer.idle_share for offer in host.offers)
