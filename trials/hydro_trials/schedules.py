"""Learning-rate schedules: closed forms of the step and one lane's hyperparameters, in ordinary Python numbers.

So a lane gets the same learning rate whatever other lanes exist, and resuming needs nothing but the step.

| schedule    | factor of `lr` after s of N steps                | in torch.optim.lr_scheduler      |
| ----------- | ------------------------------------------------ | -------------------------------- |
| constant    | 1                                                |                                  |
| cosine      | half a cosine from 1 to `final_fraction`         | CosineAnnealingLR, T_max = N     |
| step        | `gamma` to the power of floor(s / `decay_steps`) | StepLR                           |
| multistep   | `gamma` to the power of the milestones reached   | MultiStepLR                      |
| exponential | `gamma` to the power of s / `decay_steps`        | ExponentialLR at `decay_steps` 1 |
| onecycle    | cosines from 1 / `div_factor` to 1, then down to | OneCycleLR, total_steps = N, two |
|             | 1 / `div_factor` / `final_div_factor`            | phases, without cycle_momentum   |
| polynomial  | (1 - s / N) to the power of `power`              | PolynomialLR, total_iters = N    |

All but onecycle know `warmup_steps`: a linear rise over the first updates, 1/w, 2/w, …, 1. Then cosine and polynomial
span the steps that are left (SequentialLR); the others count from the first step all the same (ChainedScheduler).
From step N on, cosine, onecycle and polynomial stay where they ended; torch's cosine would rise again and its
OneCycleLR raise an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

MILESTONES = ("milestone_1", "milestone_2", "milestone_3", "milestone_4")

SCHEDULE_DEFAULTS: dict[str, dict[str, float]] = {
    "constant": {"warmup_steps": 0.0},
    "cosine": {"warmup_steps": 0.0, "final_fraction": 0.0},
    "step": {"warmup_steps": 0.0, "gamma": 0.1, "decay_steps": 0.0},
    "multistep": {"warmup_steps": 0.0, "gamma": 0.1, **dict.fromkeys(MILESTONES, 0.0)},
    "exponential": {"warmup_steps": 0.0, "decay_steps": 1.0},
    "onecycle": {"pct_start": 0.3, "div_factor": 25.0, "final_div_factor": 1e4},
    "polynomial": {"warmup_steps": 0.0, "power": 1.0},
}
"""What each schedule knows. `decay_steps` 0 means a third of the budget (step only); a milestone 0 is not used."""

SCHEDULE_REQUIRED: dict[str, tuple[str, ...]] = {"exponential": ("gamma",)}
"""What a schedule knows but has no default for."""


def lr_multiplier(schedule: str, step: int, num_steps: int, values: Mapping[str, float]) -> float:
    """Factor of the learning rate for the update after `step` finished ones, of `num_steps` in all.

    Never raises for a step beyond the end; a factor too large for a float is infinite.
    """
    warmup_steps = values.get("warmup_steps", 0.0)
    factor = min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0
    return factor * _SHAPES[schedule](step, num_steps, warmup_steps, values)


def _constant(step: int, num_steps: int, warmup_steps: float, values: Mapping[str, float]) -> float:
    return 1.0


def _cosine(step: int, num_steps: int, warmup_steps: float, values: Mapping[str, float]) -> float:
    final = values["final_fraction"]
    return _anneal(1.0, final, _progress(step, num_steps, warmup_steps))


def _step(step: int, num_steps: int, warmup_steps: float, values: Mapping[str, float]) -> float:
    decay_steps = values["decay_steps"] or max(1.0, num_steps / 3)
    return _power(values["gamma"], math.floor(min(step / decay_steps, 2.0**53)))


def _multistep(step: int, num_steps: int, warmup_steps: float, values: Mapping[str, float]) -> float:
    return _power(values["gamma"], sum(0 < values[name] <= step for name in MILESTONES))


def _exponential(step: int, num_steps: int, warmup_steps: float, values: Mapping[str, float]) -> float:
    return _power(values["gamma"], step / values["decay_steps"])


def _onecycle(step: int, num_steps: int, warmup_steps: float, values: Mapping[str, float]) -> float:
    first = 1.0 / values["div_factor"]
    last_step = num_steps - 1
    peak_step = values["pct_start"] * num_steps - 1
    step = min(step, last_step)
    if 0 < peak_step >= step:
        return _anneal(first, 1.0, step / peak_step)
    # torch divides by zero where the peak is step 0 exactly; here that step is the peak.
    progress = (step - peak_step) / (last_step - peak_step) if last_step > peak_step else 0.0
    return _anneal(1.0, first / values["final_div_factor"], progress)


def _polynomial(step: int, num_steps: int, warmup_steps: float, values: Mapping[str, float]) -> float:
    return _power(1.0 - _progress(step, num_steps, warmup_steps), values["power"])


_SHAPES: dict[str, Callable[[int, int, float, Mapping[str, float]], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "step": _step,
    "multistep": _multistep,
    "exponential": _exponential,
    "onecycle": _onecycle,
    "polynomial": _polynomial,
}


def _progress(step: int, num_steps: int, warmup_steps: float) -> float:
    """How much of the steps after the warm-up is done, from 0 to 1."""
    return min(1.0, max(0.0, step - warmup_steps) / max(1.0, num_steps - warmup_steps))


def _anneal(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` to `end`."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _power(base: float, exponent: float) -> float:
    try:
        return float(base**exponent)
    except OverflowError:
        return math.inf
