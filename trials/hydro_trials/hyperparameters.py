"""The hyperparameters that optimizers and schedules know: names, defaults, and the values that can work."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from hydro_slurm.errors import StudyError
from hydro_trials.schedules import MILESTONES, SCHEDULE_DEFAULTS, SCHEDULE_REQUIRED

CLIPPING_DEFAULTS: dict[str, float] = {"clip_norm": 0.0, "clip_value": 0.0}
"""Gradient clipping, known to every optimizer; 0 is off."""

OPTIMIZER_DEFAULTS: dict[str, dict[str, float]] = {
    "sgd": {"momentum": 0.0, "dampening": 0.0, "nesterov": 0.0, "weight_decay": 0.0, **CLIPPING_DEFAULTS},
    "adam": {
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": 0.0,
        **CLIPPING_DEFAULTS,
    },
    "adamw": {
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.01,
        "amsgrad": 0.0,
        **CLIPPING_DEFAULTS,
    },
    "rmsprop": {
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "centered": 0.0,
        **CLIPPING_DEFAULTS,
    },
    "adagrad": {
        "lr_decay": 0.0,
        "weight_decay": 0.0,
        "eps": 1e-10,
        "initial_accumulator_value": 0.0,
        **CLIPPING_DEFAULTS,
    },
    "lion": {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, **CLIPPING_DEFAULTS},
}
"""What each optimizer knows beside `lr`, with torch.optim's defaults; lion's are those of Chen et al. (2023)."""

FLAGS = frozenset({"nesterov", "amsgrad", "centered"})
"""Hyperparameters that are on or off; they may differ from lane to lane."""

TOGETHER = ("nesterov", "momentum", "dampening")
"""The names that `check_together` looks at."""

_Range = tuple[Callable[[float], bool], str]
_ABOVE_0: _Range = (lambda value: value > 0, "a number above 0")
_FROM_0: _Range = (lambda value: value >= 0, "a number of 0 or more")
_FROM_0_BELOW_1: _Range = (lambda value: 0 <= value < 1, "a number from 0 to below 1")
_FROM_0_TO_1: _Range = (lambda value: 0 <= value <= 1, "a number from 0 to 1")
_COUNT: _Range = (lambda value: value >= 1 and value == int(value), "a whole number of 1 or more")
_FLAG: _Range = (lambda value: value in (0, 1), "True, False, 0 or 1")

_RANGES: dict[str, _Range] = {
    "lr": _ABOVE_0,
    **dict.fromkeys(("momentum", "beta1", "beta2", "alpha"), _FROM_0_BELOW_1),
    **dict.fromkeys(("dampening", "pct_start"), _FROM_0_TO_1),
    **dict.fromkeys(("weight_decay", "eps", "lr_decay", "initial_accumulator_value"), _FROM_0),
    **dict.fromkeys(("clip_norm", "clip_value"), _FROM_0),
    **dict.fromkeys(("warmup_steps", "decay_steps", "final_fraction", "gamma", "power", *MILESTONES), _FROM_0),
    **dict.fromkeys(("div_factor", "final_div_factor"), _ABOVE_0),
    **dict.fromkeys(FLAGS, _FLAG),
    "batch_size": _COUNT,
}
_SCHEDULE_RANGES: dict[tuple[str, str], _Range] = {("exponential", "decay_steps"): _ABOVE_0}
"""Where a name means something narrower with one schedule."""


def required_hyperparameters(schedule: str) -> tuple[str, ...]:
    """The names without a default."""
    return ("lr", *SCHEDULE_REQUIRED.get(schedule, ()))


def known_hyperparameters(optimizer: str, schedule: str) -> list[str]:
    """Every name that a search space or `fixed` may use with this optimizer and schedule."""
    required = required_hyperparameters(schedule)
    names = [required[0], *OPTIMIZER_DEFAULTS[optimizer], *required[1:], *SCHEDULE_DEFAULTS[schedule]]
    return [*names, "batch_size"]


def used_hyperparameters(optimizer: str, fixed: Mapping[str, float], searched: Collection[str]) -> frozenset[str]:
    """The names that are searched, or not 0 in every lane: what a study's optimizer has to compute and to keep."""
    constants = {**OPTIMIZER_DEFAULTS[optimizer], **fixed}
    return frozenset(searched) | {name for name, value in constants.items() if value}


def resolve_hyperparameters(
    optimizer: str, schedule: str, fixed: Mapping[str, Any], params: Mapping[str, Any]
) -> dict[str, float]:
    """One lane's complete hyperparameters: its own, over the study's constants, over the defaults.

    Raises:
        StudyError: An unknown name, a missing one, or values that cannot work.
    """
    known = known_hyperparameters(optimizer, schedule)
    values = {**OPTIMIZER_DEFAULTS[optimizer], **SCHEDULE_DEFAULTS[schedule]}
    for name, value in {**fixed, **params}.items():
        if name not in known:
            raise StudyError(
                f"got hyperparameter {name!r}, but optimizer {optimizer!r} with schedule {schedule!r} knows only "
                f"{', '.join(known)}{hint_at(name, schedule)}"
            )
        values[name] = check_value(name, value, schedule)
    check_complete(values, schedule)
    check_together(values)
    return values


def check_value(name: str, value: Any, schedule: str) -> float:
    """`value` as a number that hyperparameter `name` may have with this schedule.

    Raises:
        StudyError: It is none.
    """
    fits, words = _SCHEDULE_RANGES.get((schedule, name)) or _RANGES[name]
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        needed = words if name in FLAGS else "a finite number"
        raise StudyError(f"hyperparameter {name!r}: got {value!r}, needed {needed}")
    if not fits(value) or (isinstance(value, bool) and name not in FLAGS):
        raise StudyError(f"hyperparameter {name!r}: got {value!r}, needed {words}")
    return float(value)


def check_complete(names: Collection[str], schedule: str) -> None:
    """Have every name that has no default.

    Raises:
        StudyError: One is missing.
    """
    for name in required_hyperparameters(schedule):
        if name not in names:
            what = "no learning rate" if name == "lr" else f"no {name!r}, which schedule {schedule!r} needs,"
            raise StudyError(f"{what} among {', '.join(sorted(names))}: name {name!r} in space or fixed")


def check_together(values: Mapping[str, float]) -> None:
    """Refuse values that only fail together.

    Raises:
        StudyError: As torch.optim.SGD would, Nesterov without momentum or with dampening.
    """
    if values.get("nesterov") and (not values["momentum"] or values["dampening"]):
        raise StudyError(
            f"nesterov: got momentum {values['momentum']:g} and dampening {values['dampening']:g}, "
            "needed a momentum above 0 and no dampening; change them or leave nesterov off"
        )


def hint_at(name: str, schedule: str) -> str:
    """What to do instead of naming an unknown hyperparameter, where there is a usual reason."""
    if name == "warmup_steps" and schedule == "onecycle":
        return "; onecycle has a warm-up of its own, whose share of the steps is pct_start"
    return ""
