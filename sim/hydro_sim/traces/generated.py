"""Synthetic traces, always labelled so."""

from __future__ import annotations

import random

from hydro_sim.traces.table import Trace, TraceJob

_SIZES = (1, 1, 1, 1, 1, 1, 1, 2, 2, 4, 4, 8, 8, 16, 32)
"""Devices of a job: mostly one, as in the public traces."""

_EPOCH_S = 1_600_000_000.0


def generate_trace(
    num_jobs: int, num_devices: int, *, load: float = 0.8, median_s: float = 900.0, num_users: int = 40, seed: int = 0
) -> Trace:
    """Jobs that arrive as a Poisson process and run for log-normal times (sigma 1.6, as in the public traces).

    Args:
        num_jobs: Jobs.
        num_devices: Devices of the cluster, to which `load` refers.
        load: Device time that is asked for, as a share of what there is.
        median_s: Median run time.
        num_users: Users that submit them.
        seed: Equal seeds give equal traces.
    """
    draw = random.Random(seed)
    sizes = [draw.choice(_SIZES) for _ in range(num_jobs)]
    durations = [max(1.0, round(median_s * draw.lognormvariate(0.0, 1.6), 1)) for _ in range(num_jobs)]
    work_s = sum(size * duration for size, duration in zip(sizes, durations, strict=True))
    gap_s = work_s / num_jobs / num_devices / load
    now_s, jobs = _EPOCH_S, []
    for size, duration_s in zip(sizes, durations, strict=True):
        now_s += draw.expovariate(1 / gap_s)
        user = f"u{min(int(draw.expovariate(0.15)), num_users - 1)}"
        jobs.append(TraceJob(now_s, duration_s, min(size, num_devices), user=user))
    return Trace(f"generated (seed {seed}, load {load:g})", True, jobs)
