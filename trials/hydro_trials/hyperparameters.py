"""The hyperparameters that optimizers and schedules know, and the schedules themselves.

A schedule is a closed-form function of the step and one lane's hyperparameters, in ordinary Python numbers: so a lane
gets the same learning rate whatever other lanes exist, and resuming needs nothing but the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hydro_slurm.errors import StudyError

OPTIMIZER_DEFAULTS: dict[str, dict[str, float]] = {
    "sgd": {"momentum": 0.0, "nesterov": 0.0, "weight_decay": 0.0},
    "adam": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
    "adamw": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01},
}
"""What each optimizer knows beside `lr`, with torch.optim's defaults."""

SCHEDULE_DEFAULTS: dict[str, dict[str, float]] = {
    "constant": {"warmup_steps": 0.0},
    "cosine": {"warmup_steps": 0.0, "final_fraction": 0.0},
    "step": {"warmup_steps": 0.0, "gamma": 0.1, "decay_steps": 0.0},
}
"""What each schedule knows. `decay_steps` 0 means a third of the budget."""

_BOUNDS: dict[str, tuple[float, float, str]] = {
    "lr": (0.0, math.inf, "above 0"),
    "momentum": (0.0, 1.0, "from 0 to below 1"),
    "beta1": (0.0, 1.0, "from 0 to below 1"),
    "beta2": (0.0, 1.0, "from 0 to below 1"),
    "weight_decay": (0.0, math.inf, "0 or more"),
    "eps": (0.0, math.inf, "0 or more"),
    "gamma": (0.0, math.inf, "0 or more"),
    "warmup_steps": (0.0, math.inf, "0 or more"),
    "decay_steps": (0.0, math.inf, "0 or more"),
    "final_fraction": (0.0, math.inf, "0 or more"),
}


def known_hyperparameters(optimizer: str, schedule: str) -> list[str]:
    """Every name that a search space or `fixed` may use with this optimizer and schedule."""
    return ["lr", *OPTIMIZER_DEFAULTS[optimizer], *SCHEDULE_DEFAULTS[schedule]]


def resolve_hyperparameters(
    optimizer: str, schedule: str, fixed: Mapping[str, Any], params: Mapping[str, Any]
) -> dict[str, float]:
    """One lane's complete hyperparameters: its own, over the study's constants, over the defaults.

    Raises:
        StudyError: An unknown name, no learning rate, or a value that cannot work.
    """
    known = known_hyperparameters(optimizer, schedule)
    values = {**OPTIMIZER_DEFAULTS[optimizer], **SCHEDULE_DEFAULTS[schedule]}
    for name, value in {**fixed, **params}.items():
        if name not in known:
            raise StudyError(
                f"got hyperparameter {name!r}, but optimizer {optimizer!r} with schedule {schedule!r} knows only "
                f"{', '.join(known)}"
            )
        values[name] = check_value(name, value)
    if "lr" not in values:
        raise StudyError(f"no learning rate among {', '.join(sorted(values))}: name 'lr' in space or fixed")
    return values


def check_value(name: str, value: Any) -> float:
    """`value` as a number that hyperparameter `name` may have.

    Raises:
        StudyError: It is none.
    """
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise StudyError(f"hyperparameter {name!r}: got {value!r}, needed a finite number")
    low, high, words = _BOUNDS.get(name, (0.0, math.inf, "0 or more"))
    if not low <= value < high or (name == "lr" and value == 0):
        raise StudyError(f"hyperparameter {name!r}: got {value!r}, needed a number {words}")
    return float(value)


def lr_multiplier(schedule: str, step: int, num_steps: int, values: Mapping[str, float]) -> float:
    """Factor of the learning rate for the update after `step` finished ones, of `num_steps` in all.

    constant: 1. cosine: half a cosine from 1 to `final_fraction`. step: times `gamma` every `decay_steps` steps.
    All rise linearly over the first `warmup_steps` updates.
    """
    warmup_steps = values["warmup_steps"]
    factor = min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0
    if schedule == "cosine":
        progress = min(1.0, max(0.0, step - warmup_steps) / max(1.0, num_steps - warmup_steps))
        final = values["final_fraction"]
        factor *= final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
    elif schedule == "step":
        decay_steps = values["decay_steps"] or max(1.0, num_steps / 3)
        factor *= values["gamma"] ** math.floor(step / decay_steps)
    return factor
