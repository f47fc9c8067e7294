"""Measures memory and throughput of a study's lanes at several fusion counts."""

from __future__ import annotations

import hashlib
import json
import resource
import statistics
import time
from pathlib import Path

import torch

from hydro_slurm.clock import SystemClock
from hydro_slurm.errors import StudyError
from hydro_slurm.formats import write_text_atomic
from hydro_trials.fusion import FusedTrainer
from hydro_trials.runtime.gating import OwnSlotGate
from hydro_trials.runtime.sample_lanes import fill_trainer
from hydro_trials.runtime.startup import keep_freed_memory
from hydro_trials.study_file import load_data, load_study
from hydro_trials.surrogate.scale import choose_scale

FORMAT, VERSION = "hydro.profile", 1
NUM_WARM_UP, NUM_STEPS = 5, 30


def profile_study(file: Path, output: Path | None, lanes: list[int], *, as_json: bool) -> str:
    """Profile the study in `file` on one CPU thread, at each of these fusion counts.

    Args:
        file: The study file.
        output: Where to write the profile too; a directory takes it as KEY.json.
        lanes: Fusion counts.
        as_json: Whether to return JSON or lines of text.
    """
    if not lanes or min(lanes) < 1:
        raise StudyError(f"--lanes: got {lanes}, needed fusion counts of 1 or more")
    torch.set_num_threads(1)
    keep_freed_memory()
    study = load_study(file)
    data = load_data(study)
    surrogate = choose_scale(study, data, gate=False).surrogate
    shapes = {name: parameter.surrogate_shape for name, parameter in surrogate.classification.parameters.items()}
    identity = repr((sorted(shapes.items()), study.optimizer, study.batch_size, surrogate.width_scale, "cpu"))
    points = []
    for num_lanes in sorted(set(lanes)):
        gate = OwnSlotGate(SystemClock())
        trainer = FusedTrainer(study, surrogate, data, study.steps, gate.check)
        fill_trainer(trainer, num_lanes)
        step_s, quantum_p99_ns = _measure(trainer)
        points.append(
            {
                "lanes": num_lanes,
                "lane_steps_per_s": round(num_lanes / step_s, 1),
                "step_ms": round(step_s * 1e3, 3),
                "quantum_p99_us": round(quantum_p99_ns / 1e3, 1),
                "lane_bytes": trainer.step_bytes(),
                # The process's own peak so far: fusion counts rise, so this is the peak of this count.
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    document = {
        "format": FORMAT,
        "version": VERSION,
        "key": hashlib.blake2b(identity.encode(), digest_size=8).hexdigest(),
        "study": study.name,
        "width_scale": float(surrogate.width_scale),
        "batch_size": study.batch_size,
        "dtype": str(trainer.layout.dtype).removeprefix("torch."),
        "device": "cpu",
        "num_threads": 1,
        "points": points,
    }
    text = json.dumps(document, indent=1)
    if output is not None:
        write_text_atomic(output / f"{document['key']}.json" if output.is_dir() else output, text + "\n")
    if as_json:
        return text
    return "\n".join(
        f"F={p['lanes']:<4} {p['lane_steps_per_s']:>9} lane steps/s  step {p['step_ms']} ms  "
        f"quantum p99 {p['quantum_p99_us']} us  peak {int(p['peak_bytes']) >> 20} MiB"
        for p in points
    )


def _measure(trainer: FusedTrainer) -> tuple[float, int]:
    """Median duration of a step in s, and the 99th percentile of the time between two boundaries in ns."""
    for _ in range(NUM_WARM_UP):
        trainer.step()
    gate = OwnSlotGate(SystemClock())
    trainer.set_check(gate.check)
    times_s = []
    for _ in range(NUM_STEPS):
        began_s = time.perf_counter()
        trainer.step()
        times_s.append(time.perf_counter() - began_s)
    return statistics.median(times_s), gate.quantum_p99_ns
