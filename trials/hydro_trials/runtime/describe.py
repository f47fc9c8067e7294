"""What a study file defines, as data: the only thing that the control plane ever sees of it."""

from __future__ import annotations

import json
from pathlib import Path

from optuna.distributions import distribution_to_json

from hydro_trials.study import Study
from hydro_trials.study_file import load_study

AUTO_SCALE = 0.0
"""Stands for "auto", which takes training steps to decide: `check` says what has become of it."""
FORMAT, VERSION = "hydro.study-description", 1


def describe_study(file: Path, *, as_json: bool) -> str:
    """The study in `file` as JSON, or as lines of text."""
    document = to_description(load_study(file))
    if as_json:
        return json.dumps(document)
    return "\n".join(f"{name}: {value}" for name, value in document.items() if name not in ("format", "version"))


def to_description(study: Study) -> dict[str, object]:
    """The JSON object of a study."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": study.name,
        "space": {name: distribution_to_json(value) for name, value in study.space.items()},
        "fixed": dict(study.fixed),
        "objective": study.objective,
        "direction": study.direction,
        "optimizer": study.optimizer,
        "schedule": study.schedule,
        "batch_size": study.batch_size,
        "steps": study.steps,
        "rungs": list(study.rung_steps),
        "trials": study.trials,
        "max_lanes": study.max_lanes,
        "width_scale": AUTO_SCALE if study.width_scale == "auto" else float(study.width_scale),
        "top_k": study.top_k,
        "seed": study.seed,
        "sampler": study.sampler,
        "pruner": study.pruner,
        "metrics": sorted(study.metrics),
    }
