"""The demo's outcome: `summary.json`, and the same as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydro_slurm.demo.cluster import NUM_STAGES, DemoCluster, Evidence
from hydro_slurm.demo.measure import (
    RankRecord,
    bubble_ratio,
    bubble_used,
    busy_blocks,
    exclusive_throughput_share,
    iteration_ms,
    lane_steps_in,
    read_rank,
    slowdown,
)
from hydro_slurm.model import BundleSpec
from hydro_slurm.study.bundle_files import BundleFiles
from hydro_slurm.study.report import StudySummary


def read_records(cluster: DemoCluster, host_job_id: int) -> list[RankRecord]:
    """What the host's ranks and the bundles on their slots recorded."""
    bundles = [BundleFiles(path) for path in sorted((cluster.study_dir / "bundles").iterdir())]
    specs: list[tuple[BundleSpec, Path]] = [(bundle.spec(), bundle.directory / "timeline.jsonl") for bundle in bundles]
    nodes = cluster.client.job(host_job_id).nodes
    records = []
    for rank in range(NUM_STAGES):
        blocks = cluster.paths.records / f"blocks.{rank}.jsonl"
        (timeline,) = cluster.paths.records.glob(f"host.{host_job_id}.{nodes[rank]}.*.jsonl")
        mine = [path for spec, path in specs if spec.slot.node == nodes[rank] and path.exists()]
        records.append(read_rank(blocks, timeline, mine))
    return records


def make_summary(
    cluster: DemoCluster, host_job_id: int, study_job_id: int, study: StudySummary, evidence: Evidence
) -> dict[str, Any]:
    """Measure and describe a finished demo.

    Raises:
        FormatError: Too little was recorded to measure anything.
    """
    records = read_records(cluster, host_job_id)
    blocks = records[0].blocks
    alone = [position for position, block in enumerate(blocks) if block.arm == "alone"]
    slow = {arm: slowdown(records, arm) for arm in ("bubbles", "colocated")}
    fusion = [BundleFiles(path).spec() for path in sorted((cluster.study_dir / "bundles").iterdir())]
    in_bubbles = sum(
        lane_steps_in(record, block.start_ns, block.end_ns)
        for record in records
        for block in record.blocks
        if block.arm == "bubbles"
    )
    return {
        "slurm_version": cluster.client.version(),
        "nodes": len(cluster.client.nodes()),
        "user": cluster.user,
        "host": {
            "job_id": host_job_id,
            "stages": NUM_STAGES,
            "iterations": sum(len(block.iterations) for block in blocks),
            "iteration_ms": {
                "alone": iteration_ms(records, "alone", alone),
                "bubbles": iteration_ms(records, "bubbles", busy_blocks(records, "bubbles")),
                "colocated": iteration_ms(records, "colocated", busy_blocks(records, "colocated")),
            },
            "slowdown": {arm: estimate.value for arm, estimate in slow.items()},
            "slowdown_ci95": {arm: list(estimate.ci95) for arm, estimate in slow.items()},
            "slowdown_n": {arm: estimate.n for arm, estimate in slow.items()},
            "bubble_ratio": bubble_ratio(records),
            "bubble_used": bubble_used(records),
        },
        "study": {
            "name": study.name,
            "job_id": study_job_id,
            "trials": {state.lower(): study.counts.get(state, 0) for state in ("COMPLETE", "PRUNED", "FAIL")},
            "fusion_count": max((spec.max_lanes for spec in fusion if spec.purpose == "search"), default=0),
            "width_scale": study.width_scale,
            "trial_steps_in_bubbles": round(in_bubbles),
            "exclusive_throughput_share": exclusive_throughput_share(records),
            "best": dataclasses.asdict(study.best) if study.best else None,
            "verified": [dataclasses.asdict(found) for found in study.verified],
        },
        "evidence": {
            "bundle_steps": [
                {"step": step.step_id, "name": step.name, "nodes": list(step.nodes)} for step in evidence.bundle_steps()
            ]
        },
    }


def table(summary: dict[str, Any]) -> str:
    """The summary for a terminal."""
    host, study = summary["host"], summary["study"]
    rows: list[Sequence[str]] = [("host iteration", "median ms", "slowdown", "95 % interval")]
    rows.append(("alone", f"{host['iteration_ms']['alone']:.1f}", "", ""))
    for arm, label in (("bubbles", "bundles in its bubbles"), ("colocated", "same bundles, no gate")):
        low, high = host["slowdown_ci95"][arm]
        rows.append(
            (
                label,
                f"{host['iteration_ms'][arm]:.1f}",
                f"{100 * host['slowdown'][arm]:+.2f} %",
                f"{100 * low:+.2f} .. {100 * high:+.2f} %",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * len(lines[2]))
    trials = "  ".join(f"{state.upper()} {count}" for state, count in study["trials"].items())
    lines += [
        "",
        f"bubbles are {100 * host['bubble_ratio']:.1f} % of the host's time; "
        f"bundles computed in {100 * host['bubble_used']:.1f} % of that",
        f"bundles in bubbles reach {100 * study['exclusive_throughput_share']:.1f} % of their throughput alone",
        f"study {study['name']}: {trials}; {study['trial_steps_in_bubbles']} trial steps in bubbles, "
        f"up to {study['fusion_count']} trials fused, width / {study['width_scale']:g}",
    ]
    for rank, found in enumerate(study["verified"], 1):
        value = "-" if found["target_value"] is None else f"{found['target_value']:.4f}"
        params = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in found["params"].items())
        lines.append(f"verified {rank}: trial {found['trial']} {params} -> {value} on the target ({found['state']})")
    return "\n".join(lines)
