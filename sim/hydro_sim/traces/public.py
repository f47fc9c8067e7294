"""Loaders of public traces: Philly and Helios, in full and in the derived forms that are commonly passed on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC
from pathlib import Path
from typing import Any

from hydro_sim.traces.table import RowError, SkipRow, Trace, TraceJob, moment, number, read_table, whole
from hydro_slurm.errors import TraceError

HELIOS_START_S = 1_585_699_200.0
"""Helios was recorded from April 2020 on; the derived sample has only intervals, so it is anchored there."""


def load_philly(path: Path) -> Trace:
    """Microsoft's Philly trace: `cluster_job_log` (JSON), or a CSV of timestamp, duration, num_gpus, gpu_time, cluster.

    The CSV's timestamp is taken as the submit time, its cluster as the partition. In the JSON a job's last attempt
    gives duration and devices.
    """
    if path.suffix != ".csv":
        return _load_philly_log(path)

    def parse(row: Mapping[str, str]) -> TraceJob:
        duration_s = number(row, "duration", least=0.0)
        num_devices = whole(row, "num_gpus")
        gpu_time = number(row, "gpu_time", least=0.0)
        if abs(gpu_time - duration_s * num_devices) > 0.01 * gpu_time + 1:
            raise RowError(f"gpu_time {gpu_time:g} is not duration {duration_s:g} times num_gpus {num_devices}")
        submit_s = moment(row["timestamp"], UTC, "timestamp")
        return _job(submit_s, duration_s, num_devices, partition=row["cluster"])

    return read_table(path, ("timestamp", "duration", "num_gpus", "gpu_time", "cluster"), parse)


def _load_philly_log(path: Path) -> Trace:
    try:
        documents = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror}") from None
    except ValueError as error:
        raise TraceError(f"{path}: not JSON ({error}); Philly's cluster_job_log was expected") from None
    if not isinstance(documents, list):
        raise TraceError(f"{path}: got {type(documents).__name__}, needed a list of jobs (Philly's cluster_job_log)")
    trace = Trace(path.name, False, [])
    for index, document in enumerate(documents, 1):
        try:
            trace.jobs.append(_philly_job(document))
        except RowError as error:
            trace.bad_rows.append((index, str(error)))
        except SkipRow as reason:
            trace.left_out[str(reason)] += 1
    if not trace.jobs:
        raise TraceError(f"{path}: none of {len(documents)} entries is a job of Philly's cluster_job_log")
    trace.jobs.sort(key=lambda job: job.submit_s)
    return trace


def _philly_job(document: Any) -> TraceJob:
    try:
        attempts, submitted = document["attempts"], document["submitted_time"]
        user, partition, name = str(document["user"]), str(document["vc"]), str(document["jobid"])
        if not attempts or not attempts[-1]["start_time"] or not attempts[-1]["end_time"]:
            raise SkipRow("never ran to an end")
        start_s = moment(attempts[-1]["start_time"], UTC, "start_time")
        end_s = moment(attempts[-1]["end_time"], UTC, "end_time")
        num_devices = sum(len(place["gpus"]) for place in attempts[-1]["detail"])
        submit_s = moment(submitted, UTC, "submitted_time")
    except (KeyError, TypeError, IndexError) as error:
        raise RowError(f"not a job of cluster_job_log: {error!r}") from None
    return _job(submit_s, end_s - start_s, num_devices, user=user, partition=partition, name=name)


def load_helios(path: Path) -> Trace:
    """SenseTime's Helios trace: `cluster_log.csv`, or the derived sample with intervals instead of times."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            header = file.readline()
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror}") from None
    if "interval" in header:
        return _load_helios_sample(path)

    def parse(row: Mapping[str, str]) -> TraceJob:
        submit_s = moment(row["submit_time"], UTC, "submit_time")
        if row["start_time"] in ("", "None", "NaN"):
            raise SkipRow("never ran")
        start_s = moment(row["start_time"], UTC, "start_time")
        end_s = moment(row["end_time"], UTC, "end_time")
        duration_s = number(row, "duration", least=0.0)
        if abs(end_s - start_s - duration_s) > 2:
            raise RowError(f"duration {duration_s:g} s is not end_time less start_time, {end_s - start_s:g} s")
        return _job(
            submit_s,
            duration_s,
            whole(row, "gpu_num"),
            user=row["user"],
            partition=row["vc"],
            name=row["job_id"],
            waited_s=start_s - submit_s,
        )

    columns = ("job_id", "user", "vc", "gpu_num", "submit_time", "start_time", "end_time", "duration")
    return read_table(path, columns, parse)


def _load_helios_sample(path: Path) -> Trace:
    now_s = HELIOS_START_S

    def parse(row: Mapping[str, str]) -> TraceJob:
        nonlocal now_s
        now_s += number(row, "interval", least=0.0)
        return _job(
            now_s, number(row, "run_time", least=0.0), whole(row, "gpu_num"), user=row["user"], name=row["u_id"]
        )

    return read_table(path, ("u_id", "user", "gpu_num", "interval", "run_time"), parse)


def _job(submit_s: float, duration_s: float, num_devices: int, **more: Any) -> TraceJob:
    if duration_s < 0:
        raise RowError(f"it ends {-duration_s:g} s before it starts")
    if num_devices == 0:
        raise SkipRow("asks for no device")
    if duration_s == 0:
        raise SkipRow("ran for no time")
    return TraceJob(submit_s, duration_s, num_devices, **more)
