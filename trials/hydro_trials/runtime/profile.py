"""Measures memory and throughput of a study's lanes at several fusion counts."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from hydro_slurm.clock import SystemClock
from hydro_slurm.errors import StudyError
from hydro_slurm.formats import to_document, write_record
from hydro_slurm.model import Profile
from hydro_trials.fusion import FusedTrainer
from hydro_trials.planner import Limits, Profiler
from hydro_trials.runtime.gating import OwnSlotGate
from hydro_trials.runtime.startup import keep_freed_memory
from hydro_trials.study_file import load_data, load_study
from hydro_trials.surrogate import study_surrogate
from hydro_trials.surrogate.scale import choose_scale


def profile_study(
    file: Path, output: Path | None, lanes: list[int] | None, limits: Limits, *, target: bool, as_json: bool
) -> str:
    """Profile the study in `file` on one CPU thread.

    Args:
        file: The study file.
        output: Where to write the profile too; a directory takes it as KEY.json.
        lanes: Fusion counts; None for 1, 2, 4, … up to the limit.
        limits: What to keep to.
        target: Measure the target instead of the surrogate.
        as_json: Whether to return JSON or lines of text.
    """
    if lanes is not None and (not lanes or min(lanes) < 1):
        raise StudyError(f"--lanes: got {lanes}, needed fusion counts of 1 or more")
    torch.set_num_threads(1)
    keep_freed_memory()
    study = load_study(file)
    data = load_data(study)
    surrogate = study_surrogate(study, 1.0, data) if target else choose_scale(study, data, gate=False).surrogate
    gate = OwnSlotGate(SystemClock())
    profiler = Profiler(lambda: FusedTrainer(study, surrogate, data, study.steps, gate.check), limits)
    profile = profiler.run(sorted(set(lanes)) if lanes is not None else None)
    if output is not None:
        write_record(output / f"{profile.key}.json" if output.is_dir() else output, profile)
    return json.dumps(to_document(profile)) if as_json else to_text(profile)


def to_text(profile: Profile) -> str:
    """A table of all points, the chosen way of each fusion count marked."""
    lines = []
    for point in sorted([*profile.points, *profile.others], key=lambda p: (p.lanes, p.step_ms)):
        mark = "*" if point in profile.points else " "
        lines.append(
            f"F={point.lanes:<4} {point.kind:<9}{mark} {point.lane_steps_per_s:>10.1f} lane steps/s  "
            f"step {point.step_ms:.3f} ms  quantum p99 {point.quantum_p99_us:.0f} us  "
            f"peak {point.peak_bytes >> 20} MiB"
        )
    lines += [f"{kind} is not used: {reason}" for kind, reason in profile.refused.items()]
    lines.append(
        f"knee at F={profile.knee_lanes}; a lane takes {profile.lane_bytes / (1 << 20):.2f} MiB"
        + (f"; {profile.stopped}" if profile.stopped else "")
    )
    return "\n".join(lines)
