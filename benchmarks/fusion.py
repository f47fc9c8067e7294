"""Fused lanes against separate training: lane-steps per second and memory per lane, by model, S and F.

Compared within one cell (model, S, F), in turns: one trial of the plain module with torch.optim; the engine's separate
steps of F lanes; its fused ways; and one plain trial in each of as many processes as there are cores. The ratios that
are claimed are against the engine's separate steps, and, as `over_plain` and `over_processes`, against torch.optim.
Each model at each S is measured in a process of its own, on one core with one thread. QUICK=1 measures less, in about 3
minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# Asking for a GPU must leave CUDA alone here: it does not survive the forks that measure.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch
import torch._dynamo  # torch.optim imports it at first use, which takes seconds: once, before the forks
from fusion_results import AGAIN, FUSED_KINDS, PLAIN, PROCESSES, TARGET, Cell, Series, claims_of, heading, memory_claim
from fusion_results import table as rows
from fusion_ways import Processes, Stepped, Subject, Way, fused, in_child, peak_bytes, plain, time_ways
from harness import Claim, write_claims
from zoo import ZOO

from hydro_slurm.errors import FusionError
from hydro_trials.fusion.program import COMPILED, SEPARATE
from hydro_trials.surrogate import make_surrogate

LIMIT_S = {"cpu": 18 * 60.0, "cuda": math.inf}
"""After this long only the smallest F is measured of what is left."""
MAX_GPU_PROCESSES = 8
PATIENCE = 4
"""An F is left out where it would take this many times the seconds of its cell."""


@dataclass(frozen=True)
class Plan:
    """What is measured of one model."""

    scales: tuple[int, ...]
    lanes: tuple[int, ...]
    seconds: float
    """Of timing, per cell."""
    min_rounds: int
    max_rounds: int = 40


def powers(largest: int) -> tuple[int, ...]:
    """1, 2, 4 and so on."""
    return tuple(1 << exponent for exponent in range(largest.bit_length()))


def plan(model: str, device: str, *, quick: bool) -> Plan:
    """On a CPU, convolutional nets at S=8 only: wider ones would take all the time there is."""
    if device == "cuda":
        largest = 256 if model in ("mlp", "resnet18") else 64
        lanes = tuple(sorted({*powers(largest), 100} if model == "resnet18" else powers(largest)))
        return Plan((8,), lanes[::3], 5.0, 4, 8) if quick else Plan((1, 2, 4, 8), lanes, 20.0, 6, 16)
    if model == "mlp":
        return Plan((1, 8), (1, 8, 64), 2.0, 6) if quick else Plan((1, 2, 4, 8), powers(64), 3.5, 12)
    if model == "gpt":
        return Plan((8,), (1, 4), 5.0, 4) if quick else Plan((1, 2, 4, 8), powers(8), 10.0, 6)
    return Plan((8,), (1, 4), 5.0, 4) if quick else Plan((8,), powers(8), 18.0, 8)


def measure(model: str, scale: int, device: str, planned: Plan, end_s: float) -> Series:
    """Every F of one model at one S. To be run in a process of its own: it pins itself to a core.

    Args:
        model: Its name in the zoo.
        scale: S.
        device: cpu or cuda.
        planned: What is measured.
        end_s: Moment (time.monotonic) by which it must be over: what does not fit is left out.
    """
    cores = sorted(os.sched_getaffinity(0))
    if device == "cuda":
        cores = cores[:MAX_GPU_PROCESSES]
    torch.set_num_threads(1)
    entry = ZOO[model]
    study = entry.study(device, scale)
    subject = Subject(study, make_surrogate(entry.build, scale, study.optimizer), entry.data(device), device)
    series = Series(model, scale, len(cores))
    processes = Processes(subject, cores)
    target = None
    if device == "cuda":
        target = dataclasses.replace(subject, surrogate=make_surrogate(entry.build, 1, study.optimizer))
    os.sched_setaffinity(0, cores[:1])
    ways = available(series, subject)
    gc.collect()
    gc.freeze()  # else every collection between measurements goes through all of torch again
    for lanes in planned.lanes:
        if series.cells:
            predicted_s = planned.min_rounds * series.cells[-1].predict_round_s(lanes)
            left_s = end_s - time.monotonic()
            if predicted_s > min(left_s, PATIENCE * planned.seconds):
                series.notes.append(f"F={lanes} left out: it takes {predicted_s:.0f} s, {left_s:.0f} s are left in all")
                break
        try:
            cell = measure_cell(subject, ways, processes, target, lanes, planned)
        except torch.OutOfMemoryError:
            series.notes.append(f"F={lanes} left out: out of memory")
            break
        series.cells.append(cell)
    processes.close()
    if not series.cells:
        raise RuntimeError("; ".join(series.notes))
    return series


def available(series: Series, subject: Subject) -> dict[str, Callable[[int], Stepped]]:
    """Ways of running lanes that this model can be run, by name; notes the others."""
    found: dict[str, Callable[[int], Stepped]] = {}
    kinds = [kind for kind in FUSED_KINDS if kind != COMPILED or subject.device == "cuda"]
    for kind in (SEPARATE, *kinds):
        make = partial(fused, subject, kind=kind)
        try:
            make(2).step()
        except FusionError as error:
            series.notes.append(f"{kind}: not available: {error}")
        else:
            found[kind] = make
    return found


def measure_cell(
    subject: Subject,
    makers: Mapping[str, Callable[[int], Stepped]],
    processes: Processes,
    target: Subject | None,
    lanes: int,
    planned: Plan,
) -> Cell:
    """Memory and speed at one F."""
    peaks = {name: peak_bytes(make, lanes, subject.device) for name, make in makers.items()}
    peaks[PLAIN] = peak_bytes(lambda _: plain(subject), 1, subject.device)
    ways: dict[str, Way] = {name: make(lanes) for name, make in makers.items()}
    ways[PLAIN] = plain(subject)
    ways[AGAIN] = makers[SEPARATE](lanes)
    ways[PROCESSES] = processes
    if target is not None:
        ways[TARGET] = plain(target)
    rates = time_ways(ways, seconds=planned.seconds, min_rounds=planned.min_rounds, max_rounds=planned.max_rounds)
    return Cell(lanes, rates, peaks)


def main() -> None:
    """Measure, print a line per cell, and write the claims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/bench/fusion.json"))
    parser.add_argument("--models", default=",".join(ZOO), help="some of them, with commas between")
    parser.add_argument("--quick", action="store_true", default=os.environ.get("QUICK") == "1", help="as QUICK=1")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(heading(), flush=True)
    claims: list[Claim] = []
    num_failed = 0
    end_s = time.monotonic() + LIMIT_S[device]
    for model in arguments.models.split(","):
        planned = plan(model, device, quick=arguments.quick)
        memory = None
        for scale in planned.scales:
            try:
                series = in_child(partial(measure, model, scale, device, planned, end_s))
            except RuntimeError as error:  # the others can still be measured
                print(f"{model} s{scale}: {error}", flush=True)
                num_failed += 1
                continue
            print(rows(series), flush=True)
            claims += claims_of(series, device)
            memory = memory_claim(series) or memory
        if memory is not None:
            claims.append(memory)
    print()
    write_claims(arguments.output, claims)
    sys.exit(num_failed > 0)


if __name__ == "__main__":
    main()
