"""Plausibility: a wrong unit or time zone shows in figures that no cluster has."""

from __future__ import annotations

import statistics

from hydro_sim.traces.table import Trace
from hydro_slurm.errors import TraceError

YEAR_S = 365 * 86400.0
LONGEST_JOB_S = 200 * 86400.0
EARLIEST_S, LATEST_S = 946_684_800.0, 4_102_444_800.0  # years 2000 and 2100


def check_plausible(trace: Trace) -> None:
    """Refuse what cannot be, and warn about what hardly can.

    Raises:
        TraceError: A unit or an epoch is certainly wrong.
    """
    jobs = trace.jobs
    durations = [job.duration_s for job in jobs]
    median_s, longest_s = statistics.median(durations), max(durations)
    if median_s > 30 * 86400:
        raise TraceError(
            f"{trace.origin}: half of the jobs run for {median_s / 86400:,.0f} days or more; are the durations in "
            "milliseconds? They are taken as seconds"
        )
    if longest_s > LONGEST_JOB_S:
        trace.warnings.append(f"the longest job runs for {longest_s / 86400:,.0f} days")
    if len(jobs) >= 100 and longest_s < 60:
        trace.warnings.append(
            f"no job runs for more than {longest_s:.0f} s; are the durations in minutes or hours? They are taken as "
            "seconds"
        )
    if jobs[0].submit_s < EARLIEST_S or jobs[-1].submit_s > LATEST_S:
        raise TraceError(
            f"{trace.origin}: submit times lie outside the years 2000 to 2100 (first {jobs[0].submit_s:.0f} s, last "
            f"{jobs[-1].submit_s:.0f} s since the epoch); are they in milliseconds?"
        )
    if trace.span_s > 3 * YEAR_S:
        trace.warnings.append(f"jobs are submitted over {trace.span_s / YEAR_S:.1f} years; is one of the times wrong?")
    largest = max(job.num_devices for job in jobs)
    if largest > 65536:
        raise TraceError(f"{trace.origin}: a job asks for {largest:,} devices; is that column CPUs or memory?")
    _check_zone(trace)


def _check_zone(trace: Trace) -> None:
    """A trace that records waiting itself shows by it whether submit and start times share a time zone."""
    waits = [job.waited_s for job in trace.jobs if job.waited_s is not None]
    if len(waits) < 20:
        return
    negative = sum(wait < 0 for wait in waits)
    if negative > len(waits) // 2:
        typical_h = statistics.median(wait for wait in waits if wait < 0) / 3600
        raise TraceError(
            f"{trace.origin}: {negative} of {len(waits)} jobs start before they are submitted (typically by "
            f"{-typical_h:.1f} h): submit and start times are of different time zones"
        )
    shortest = min(waits)
    if shortest >= 1800 and shortest % 1800 < 60:
        trace.warnings.append(
            f"no job starts sooner than {shortest / 3600:.1f} h after it was submitted; are submit and start times of "
            "different time zones?"
        )
