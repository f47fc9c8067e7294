"""A run's results as files: tables as CSV, the summary as JSON, the report as one HTML page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from hydro_sim import metrics
from hydro_sim.metrics import Row
from hydro_sim.report import render_report
from hydro_sim.simulation import Simulation
from hydro_slurm.formats import write_text_atomic


def to_csv(rows: Sequence[Row]) -> str:
    """Rows that have the same keys as CSV text; empty for none."""
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def job_rows(simulation: Simulation) -> list[Row]:
    """One row per job of the base load."""
    jobs = simulation.engine.jobs
    return [
        {
            "job": index,
            "name": job.name,
            "user": job.user,
            "devices": job.num_devices,
            "submit_s": round(jobs.submit_s[index], 3),
            "start_s": round(jobs.first_start_s[index], 3),
            "end_s": round(jobs.end_s[index], 3) if jobs.start_s[index] >= 0 else "",
        }
        for index, job in enumerate(simulation.base_jobs)
    ]


def write_results(simulation: Simulation, folder: Path) -> Row:
    """Write everything that a run has shown. Equal runs write equal files, to the byte.

    Returns:
        The summary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = metrics.summary(simulation)
    tables = {
        "studies": metrics.study_rows(simulation),
        "hosts": metrics.host_rows(simulation),
        "bundles": metrics.bundle_rows(simulation),
        "users": metrics.user_rows(simulation),
        "partitions": metrics.partition_rows(simulation),
        "jobs": job_rows(simulation),
    }
    for name, rows in tables.items():
        write_text_atomic(folder / f"{name}.csv", to_csv(rows))
    write_text_atomic(folder / "summary.json", json.dumps(found, indent=1) + "\n")
    write_text_atomic(folder / "report.html", render_report(simulation, found, tables))
    return found
