"""Tries a study file out: does it build, shrink, fuse and train, and what does a lane cost?"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch

from hydro_slurm.clock import SystemClock
from hydro_slurm.errors import HydroError, StudyError, SurrogateError
from hydro_slurm.formats import from_document, to_document
from hydro_slurm.model import Profile
from hydro_trials.fusion import FusedTrainer
from hydro_trials.fusion.sharing import separating_names
from hydro_trials.planner import Limits, Profiler
from hydro_trials.runtime.gating import OwnSlotGate
from hydro_trials.runtime.profile import to_text
from hydro_trials.runtime.sample_lanes import fill_trainer
from hydro_trials.runtime.startup import keep_freed_memory
from hydro_trials.study import Data, Study
from hydro_trials.study_file import describe_error, load_data, load_study
from hydro_trials.surrogate import Surrogate
from hydro_trials.surrogate.limits import poor_transfers
from hydro_trials.surrogate.scale import ChosenScale, choose_scale

FORMAT, VERSION = "hydro.study-check", 2
NUM_STEPS, MAX_TRIED_LANES = 8, 8
PROFILE_BUDGET_S = 10.0
"""Of computing, for a first look at what fusing brings; `hydro_trials profile` takes its time."""


def check_study(file: Path, *, as_json: bool) -> str:
    """Check the study in `file`; what was found as JSON, or as lines of text.

    Raises:
        HydroError: The first thing that does not work.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    study = load_study(file)
    data = load_data(study)
    chosen = _choose(file, study, data, gate=False)
    surrogate = chosen.surrogate
    gate = OwnSlotGate(SystemClock())
    trainer = FusedTrainer(study, surrogate, data, study.steps, gate.check)
    step_ms = _try_steps(file, study, trainer)
    limits = Limits(
        max_lanes=study.max_lanes,
        budget_s=PROFILE_BUDGET_S,
        factor=4,
        num_steps=study.steps if study.compile else 0,
    )
    profile = Profiler(lambda: FusedTrainer(study, surrogate, data, study.steps, lambda site: None), limits).run()
    if chosen.check is None:  # after a first step, whose errors say more
        chosen = _choose(file, study, data, gate=True)
    warnings = [*_coordinate_warnings(study, chosen), *surrogate.notes, *poor_transfers(study)]
    document = {
        "format": FORMAT,
        "version": VERSION,
        "name": study.name,
        "width_scale": float(surrogate.width_scale),
        "coordinate_check": _coordinates(chosen),
        "warnings": warnings,
        "num_parameters": {"target": _count(surrogate, target=True), "surrogate": _count(surrogate, target=False)},
        "parameters": {
            name: {
                "kind": parameter.kind,
                "target_shape": list(parameter.target_shape),
                "surrogate_shape": list(parameter.surrogate_shape),
                "lr_factor": surrogate.rules[name].lr,
                "weight_decay_factor": surrogate.rules[name].weight_decay,
            }
            for name, parameter in surrogate.classification.parameters.items()
        },
        "readouts": list(surrogate.classification.readouts),
        "lanes": len(trainer.lanes),
        "step_ms": round(step_ms, 3),
        "quantum_p99_us": round(gate.quantum_p99_ns / 1e3, 1),
        "separates": list(separating_names(study, surrogate.make(0), data)),
        "profile": to_document(profile),
    }
    return json.dumps(document) if as_json else _to_text(document)


def _choose(file: Path, study: Study, data: Data, *, gate: bool) -> ChosenScale:
    try:
        return choose_scale(study, data, gate=gate)
    except HydroError:
        raise
    except Exception as error:
        raise StudyError(f"training a step failed: {describe_error(error, file.absolute())}") from error


def _coordinate_warnings(study: Study, chosen: ChosenScale) -> list[str]:
    """What the coordinate check found, where the study wants to be warned only.

    Raises:
        SurrogateError: It found something, and the study is to be refused then.
    """
    problems = chosen.check.problems if chosen.check else []
    if problems and study.coordinate_check == "refuse":
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise SurrogateError(
            f"the surrogate at width_scale {chosen.surrogate.width_scale:g} would not transfer: {problems[0]}{more}; "
            "`hydro surrogate check FILE` shows it whole; mend the model, or use another width_scale (1: no surrogate)"
        )
    return problems


def _coordinates(chosen: ChosenScale) -> dict[str, object] | None:
    if chosen.check is None:
        return None
    return {
        "width_scales": list(chosen.check.width_scales),
        "num_outputs": len(chosen.check.slopes),
        "lr": chosen.check.lr,
        "problems": chosen.check.problems,
        "refused": {f"{scale:g}": reason for scale, reason in chosen.refused.items()},
    }


def _try_steps(file: Path, study: Study, trainer: FusedTrainer) -> float:
    """Train and evaluate a few lanes; returns the median time of a step in ms."""
    try:
        fill_trainer(trainer, min(study.max_lanes, MAX_TRIED_LANES))
        times_ms = []
        for _ in range(NUM_STEPS):
            began_s = time.perf_counter()
            trainer.step()
            times_ms.append((time.perf_counter() - began_s) * 1e3)
        trainer.evaluate(trainer.trials[:1])
    except HydroError:
        raise
    except Exception as error:
        raise StudyError(f"training a step failed: {describe_error(error, file.absolute())}") from error
    return statistics.median(times_ms)


def _count(surrogate: Surrogate, *, target: bool) -> int:
    parameters = surrogate.classification.parameters.values()
    return sum(torch.Size(p.target_shape if target else p.surrogate_shape).numel() for p in parameters)


def _to_text(document: dict[str, object]) -> str:
    lines = []
    for name, value in document.items():
        if isinstance(value, dict) and name == "parameters":
            lines.append("parameters:")
            lines += [
                f"  {key:<40} {entry['kind']:<7} {tuple(entry['target_shape'])} -> {tuple(entry['surrogate_shape'])} "
                f"lr x {entry['lr_factor']:g}, decay x {entry['weight_decay_factor']:g}"
                for key, entry in value.items()
            ]
        elif name == "profile":
            lines += to_text(from_document(Profile, json.loads(json.dumps(value)), "the profile")).splitlines()
        elif name not in ("format", "version"):
            lines.append(f"{name}: {value}")
    return "\n".join(lines)
