"""Slurm's own accounting: the output of `sacct --parsable2`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from hydro_sim.traces.table import RowError, SkipRow, Trace, TraceJob, moment, read_table, time_zone

COLUMNS = ("JobID", "User", "Partition", "State", "Submit", "Start", "End", "ElapsedRaw", "Timelimit", "AllocTRES")
OPTIONAL = ("JobName", "Account", "ReqTRES", "NNodes", "TimelimitRaw", "Comment")

COMMAND = (
    "sacct --allusers --allocations --parsable2 --starttime=DATE --endtime=DATE "
    "--format=JobID,JobName,User,Account,Partition,State,Submit,Start,End,ElapsedRaw,Timelimit,ReqTRES,AllocTRES,Comment"
)
"""What an admin runs to get the file (SLURM_TIME_FORMAT must not be set)."""

_STEP = re.compile(r"^\d+(_\[?[\d,\-%]+\]?)?(\+\d+)?\.")
_JOB = re.compile(r"^\d+(_\d+|_\[[\d,\-%]+\])?(\+\d+)?$")
_LIMIT = re.compile(r"^(?:(\d+)-)?(\d+):(\d\d):(\d\d)(?:\.\d+)?$")
_GPUS = re.compile(r"^gres/gpu(:[^=]+)?=(\d+)([KMG]?)$")


def load_sacct(path: Path, *, zone: str = "", partitions: tuple[str, ...] = ()) -> Trace:
    """Jobs with GPUs of a `sacct` export.

    Steps (`41.0`, `41.batch`) are left out, and so is what never ran, still runs, or held no GPU.

    Args:
        path: The file; `COMMAND` makes it.
        zone: Time zone of the times, which sacct writes as the local time of where it ran; UTC if empty.
        partitions: Only these; all if empty.
    """
    tz = time_zone(zone)

    def parse(row: Mapping[str, str]) -> TraceJob:
        job_id = row["JobID"]
        if _STEP.match(job_id):
            raise SkipRow("steps of jobs")
        if not _JOB.match(job_id):
            raise RowError(f"JobID: got {job_id!r}, needed a number, maybe with an array index")
        if partitions and row["Partition"] not in partitions:
            raise SkipRow("other partitions")
        if row["Start"] in ("Unknown", "None", ""):
            raise SkipRow("never started")
        if row["End"] in ("Unknown", "None", ""):
            raise SkipRow("still running")
        num_devices = count_gpus(row["AllocTRES"])
        if num_devices == 0:
            raise SkipRow("held no GPU")
        submit_s = moment(row["Submit"], tz, "Submit")
        start_s, end_s = moment(row["Start"], tz, "Start"), moment(row["End"], tz, "End")
        elapsed = row["ElapsedRaw"]
        if not elapsed.isdigit():
            raise RowError(f"ElapsedRaw: got {elapsed!r}, needed whole seconds")
        duration_s = float(elapsed)
        # Suspended time and a change to summer time in between are the honest reasons for a difference.
        if duration_s > end_s - start_s + 3660:
            raise RowError(f"ElapsedRaw {elapsed} s is more than End less Start, {end_s - start_s:.0f} s: which unit?")
        if duration_s == 0:
            raise SkipRow("ran for no time")
        return TraceJob(
            submit_s,
            duration_s,
            num_devices,
            user=row["User"],
            partition=row["Partition"].partition(",")[0],
            name=job_id,
            limit_s=time_limit_s(row["Timelimit"]),
            waited_s=start_s - submit_s,
            comment=row.get("Comment", ""),
        )

    return read_table(path, COLUMNS, parse, delimiter="|", optional=OPTIONAL)


def count_gpus(tres: str) -> int:
    """GPUs in a TRES list such as `billing=64,cpu=64,gres/gpu:a100=8,gres/gpu=8,node=1`.

    The plain `gres/gpu` is the total where it is given; typed ones are counted only without it.
    """
    total, typed = 0, 0
    for item in filter(None, tres.split(",")):
        found = _GPUS.match(item)
        if found:
            if found[3]:
                raise RowError(f"AllocTRES: got {item!r}, needed a plain number of GPUs")
            if found[1]:
                typed += int(found[2])
            else:
                total = int(found[2])
        elif "=" not in item:
            raise RowError(f"AllocTRES: got {item!r}, needed NAME=COUNT")
    return total or typed


def time_limit_s(text: str) -> float | None:
    """Seconds of a time limit; None for one that is unlimited or the partition's."""
    if text in ("UNLIMITED", "Partition_Limit", ""):
        return None
    found = _LIMIT.match(text)
    if not found:
        raise RowError(f"Timelimit: got {text!r}, needed [DAYS-]HH:MM:SS")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds) or None
