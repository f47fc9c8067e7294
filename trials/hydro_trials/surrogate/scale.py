"""Which width scale a study uses, and the proof that it may: the coordinate check as a gate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution
from torch import Size

from hydro_slurm.errors import SurrogateError
from hydro_trials.samples import call_model, first
from hydro_trials.study import Data, Study
from hydro_trials.study_file import describe_error
from hydro_trials.surrogate.coordinate_check import CoordinateCheck, check_coordinates
from hydro_trials.surrogate.surrogate import Surrogate, study_surrogate
from hydro_trials.surrogate.trace import module_names

NUM_STEPS, NUM_SEEDS = 3, 4
QUICK_STEPS = 2
MANY_PARAMETERS = 2_000_000
"""Larger targets are checked at the narrow end, which says the same in seconds instead of hours."""


@dataclass(frozen=True)
class ChosenScale:
    """A surrogate, and what was found out about it."""

    surrogate: Surrogate
    check: CoordinateCheck | None
    """None where the target trains itself (S = 1), and where nothing was asked."""
    refused: dict[float, str]
    """Larger width scales that "auto" tried, and why they were not taken."""


def choose_scale(study: Study, data: Data, *, gate: bool) -> ChosenScale:
    """The study's surrogate; with "auto", the largest width scale up to its bound that passes the coordinate check.

    Args:
        study: The study.
        data: Its data.
        gate: Whether a width scale that the study names is checked too.

    Raises:
        SurrogateError: It cannot be shrunk by what it names, or by nothing with "auto".
    """
    if study.width_scale != "auto":
        surrogate = study_surrogate(study, study.width_scale, data)
        checked = check_scale(study, data, surrogate) if gate and study.width_scale != 1 else None
        return ChosenScale(surrogate, checked, {})
    refused: dict[float, str] = {}
    for scale in range(math.floor(study.max_width_scale), 1, -1):
        try:
            surrogate = study_surrogate(study, scale, data)
            checked = check_scale(study, data, surrogate)
        except SurrogateError as error:
            refused[float(scale)] = str(error)
            continue
        if not checked.problems:
            return ChosenScale(surrogate, checked, refused)
        refused[float(scale)] = checked.problems[0]
    reasons = "; ".join(f"S={scale:g}: {reason}" for scale, reason in refused.items())
    raise SurrogateError(
        f"no width_scale from 2 to {study.max_width_scale:g} works ({reasons}); set width_scale to 1 to search on the "
        "target itself"
    )


def check_scale(study: Study, data: Data, surrogate: Surrogate, *, quick: bool = True) -> CoordinateCheck:
    """The coordinate check of one width scale, at three widths (quick) or up to five.

    Raises:
        SurrogateError: Fewer than three widths can be built.
    """
    found = {surrogate.width_scale: surrogate}
    scales = check_widths(study, data, surrogate, found, most=3 if quick else 5)
    return check_coordinates(
        study,
        data,
        calm_params(study),
        scales,
        num_steps=QUICK_STEPS if quick else NUM_STEPS,
        num_seeds=NUM_SEEDS,
        shrink=found.__getitem__,
    )


def check_widths(
    study: Study, data: Data, surrogate: Surrogate, found: dict[float, Surrogate], *, most: int
) -> list[float]:
    """Width scales to compare: from the surrogate's towards the target's 1; `found` takes their surrogates.

    Raises:
        SurrogateError: The surrogate does not run, or fewer than three can be built.
    """
    _run_forward(surrogate, data)
    scale = surrogate.width_scale
    num_parameters = sum(Size(p.target_shape).numel() for p in surrogate.classification.parameters.values())
    halved = [scale / 2**power for power in range(1, 8) if scale / 2**power > 1]
    if num_parameters > MANY_PARAMETERS:
        wanted = [scale, *halved, 1.0, 2 * scale, math.sqrt(scale)]
    elif most == 3:
        wanted = [scale, 1.0, *sorted(halved, key=lambda other: abs(math.log(other**2 / scale))), math.sqrt(scale)]
        wanted += [2 * scale, 4 * scale]
    else:
        wanted = [scale, 1.0, *halved, math.sqrt(scale), 2 * scale]
    scales: list[float] = []
    reason = ""
    for candidate in wanted:
        if len(scales) == most or (len(scales) >= 3 and candidate in (math.sqrt(scale), 2 * scale)):
            break
        if candidate in scales:
            continue
        try:
            if candidate not in found:
                other = study_surrogate(study, candidate, data, redraw=True)
                _run_forward(other, data)
                found[candidate] = other
            scales.append(candidate)
        except SurrogateError as error:
            reason = str(error)
    if len(scales) < 3:
        raise SurrogateError(
            f"width_scale {scale:g} cannot be checked: that takes three widths, and only "
            f"{' and '.join(f'S={each:g}' for each in scales)} can be built ({reason}); choose another width_scale"
        )
    return sorted(scales)


def _run_forward(surrogate: Surrogate, data: Data) -> None:
    """Run a surrogate once: a size that can be built need not fit the model's forward.

    Raises:
        SurrogateError: It fails. (What the target itself raises is the study's to mend, whatever its width.)
    """
    if surrogate.width_scale == 1:
        return
    module = surrogate.make(0).eval()
    with torch.no_grad(), module_names(module) as names:
        try:
            call_model(module, first(data.train[0], 2))
        except Exception as error:
            raise SurrogateError(
                f"module {names[-1] or 'of the study'} does not run at width_scale {surrogate.width_scale:g}: "
                f"{describe_error(error)}"
            ) from error


def calm_params(study: Study) -> dict[str, Any]:
    """One configuration of the search space: its middle, with the learning rate a quarter of the way up."""
    params = {name: _within(distribution, 0.5) for name, distribution in study.space.items()}
    if "lr" in study.space:
        params["lr"] = _within(study.space["lr"], 0.25)
    return params


def _within(distribution: BaseDistribution, share: float) -> Any:
    """The value that lies `share` of the way up a distribution."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[min(len(distribution.choices) - 1, int(share * len(distribution.choices)))]
    low, high = getattr(distribution, "low"), getattr(distribution, "high")  # noqa: B009
    if getattr(distribution, "log", False):
        value = math.exp((1 - share) * math.log(low) + share * math.log(high))
    else:
        value = (1 - share) * low + share * high
    return round(value) if isinstance(low, int) else value
