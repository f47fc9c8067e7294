"""Schedules: torch.optim.lr_scheduler in closed form, and nothing but the step and the lane's values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

import hydro_trials as hydro
from hydro_slurm.errors import StudyError
from hydro_trials.fusion.layout import FlatLayout
from hydro_trials.fusion.optimizers import FusedOptimizer, LaneSettings
from hydro_trials.hyperparameters import known_hyperparameters, resolve_hyperparameters
from hydro_trials.schedules import MILESTONES, SCHEDULE_DEFAULTS, lr_multiplier
from hydro_trials.surrogate import ParamRule

MakeStudy = Callable[..., hydro.Study]
MakeScheduler = Callable[[Optimizer], LRScheduler]

LR, NUM_STEPS = 0.3, 60


def resolve(schedule: str, **values: Any) -> dict[str, float]:
    return resolve_hyperparameters("sgd", schedule, {}, {"lr": LR, **values})


def lrs(schedule: str, num_steps: int = NUM_STEPS, until: int | None = None, **values: Any) -> list[float]:
    resolved = resolve(schedule, **values)
    return [LR * lr_multiplier(schedule, step, num_steps, resolved) for step in range(until or num_steps)]


def torch_lrs(make: MakeScheduler, num_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR steps its parts in a way that they warn of
        scheduler = make(optimizer)
        for step in range(num_steps):
            if step:
                optimizer.step()
                scheduler.step()
            found.append(float(optimizer.param_groups[0]["lr"]))
    return found


def warm(optimizer: Optimizer, steps: int) -> LRScheduler:
    return lr_scheduler.LinearLR(optimizer, 1 / steps, 1.0, steps - 1)


def times_warm_up(steps: int, make: MakeScheduler) -> MakeScheduler:
    return lambda o: lr_scheduler.ChainedScheduler([warm(o, steps), make(o)])


def after_warm_up(steps: int, make: MakeScheduler) -> MakeScheduler:
    return lambda o: lr_scheduler.SequentialLR(o, [warm(o, steps), make(o)], milestones=[steps])


def step_lr(size: int, gamma: float) -> MakeScheduler:
    return lambda o: lr_scheduler.StepLR(o, size, gamma)


def multistep_lr(at: list[int], gamma: float) -> MakeScheduler:
    return lambda o: lr_scheduler.MultiStepLR(o, at, gamma)


def exponential_lr(gamma: float) -> MakeScheduler:
    return lambda o: lr_scheduler.ExponentialLR(o, gamma)


def cosine_lr(steps: int, final: float = 0.0) -> MakeScheduler:
    return lambda o: lr_scheduler.CosineAnnealingLR(o, steps, LR * final)


def polynomial_lr(steps: int, power: float) -> MakeScheduler:
    return lambda o: lr_scheduler.PolynomialLR(o, steps, power)


def onecycle_lr(*shape: float, steps: int = NUM_STEPS) -> MakeScheduler:
    return lambda o: lr_scheduler.OneCycleLR(
        o, LR, steps, pct_start=shape[0], div_factor=shape[1], final_div_factor=shape[2], cycle_momentum=False
    )


M1, M2, M3, M4 = MILESTONES


@pytest.mark.parametrize(
    ("schedule", "values", "make"),
    [
        ("constant", {}, lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0)),
        ("constant", {"warmup_steps": 7}, lambda o: warm(o, 7)),
        ("step", {"decay_steps": 10}, step_lr(10, 0.1)),
        ("step", {"decay_steps": 7, "gamma": 0.5}, step_lr(7, 0.5)),
        ("step", {"gamma": 0.5}, step_lr(20, 0.5)),
        ("step", {"decay_steps": 9, "gamma": 0.3, "warmup_steps": 12}, times_warm_up(12, step_lr(9, 0.3))),
        ("multistep", {M1: 10, M2: 30, M3: 45, M4: 50}, multistep_lr([10, 30, 45, 50], 0.1)),
        ("multistep", {M1: 40, M3: 12, "gamma": 0.7}, multistep_lr([12, 40], 0.7)),
        ("multistep", {M1: 20, M2: 20, "gamma": 0.7}, multistep_lr([20, 20], 0.7)),
        ("multistep", {M1: 3, M2: 20, "warmup_steps": 5}, times_warm_up(5, multistep_lr([3, 20], 0.1))),
        ("exponential", {"gamma": 0.9}, exponential_lr(0.9)),
        ("exponential", {"gamma": 1.05}, exponential_lr(1.05)),
        ("exponential", {"gamma": 0.9**10, "decay_steps": 10}, exponential_lr(0.9)),
        ("exponential", {"gamma": 0.95, "warmup_steps": 6}, times_warm_up(6, exponential_lr(0.95))),
        ("cosine", {}, cosine_lr(60)),
        ("cosine", {"final_fraction": 0.1}, cosine_lr(60, 0.1)),
        ("cosine", {"final_fraction": 0.2, "warmup_steps": 10}, after_warm_up(10, cosine_lr(50, 0.2))),
        ("polynomial", {}, polynomial_lr(60, 1.0)),
        ("polynomial", {"power": 2.5}, polynomial_lr(60, 2.5)),
        ("polynomial", {"power": 0}, polynomial_lr(60, 0.0)),
        ("polynomial", {"power": 0.5, "warmup_steps": 15}, after_warm_up(15, polynomial_lr(45, 0.5))),
        ("onecycle", {}, onecycle_lr(0.3, 25, 1e4)),
        ("onecycle", {"pct_start": 0.11, "div_factor": 3, "final_div_factor": 0.5}, onecycle_lr(0.11, 3, 0.5)),
        ("onecycle", {"pct_start": 0}, onecycle_lr(0.0, 25, 1e4)),
        ("onecycle", {"pct_start": 1}, onecycle_lr(1.0, 25, 1e4)),
    ],
)
def test_every_schedule_is_torch_s(schedule: str, values: dict[str, Any], make: MakeScheduler) -> None:
    assert lrs(schedule, **values) == pytest.approx(torch_lrs(make, NUM_STEPS), rel=1e-12, abs=0)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_onecycle_of_few_steps_is_torch_s(num_steps: int) -> None:
    assert lrs("onecycle", num_steps) == pytest.approx(
        torch_lrs(onecycle_lr(0.3, 25, 1e4, steps=num_steps), num_steps), rel=1e-12, abs=0
    )


def test_onecycle_peaks_at_once_where_torch_divides_by_zero() -> None:
    with pytest.raises(ZeroDivisionError):
        torch_lrs(onecycle_lr(0.25, 25, 1e4, steps=4), 4)
    assert lrs("onecycle", 4, pct_start=0.25)[0] == LR
    assert lrs("onecycle", 1, pct_start=1) == [LR]


def test_warm_up_rises_to_the_whole_rate_and_may_be_a_fraction() -> None:
    assert lrs("constant", until=6, warmup_steps=4) == [LR * part for part in (0.25, 0.5, 0.75, 1, 1, 1)]
    assert lrs("constant", until=3, warmup_steps=2.5) == [LR * part for part in (0.4, 0.8, 1)]


@pytest.mark.parametrize(
    ("schedule", "values", "end"),
    [
        ("cosine", {"final_fraction": 0.25}, 0.25),
        ("polynomial", {}, 0.0),
        ("polynomial", {"power": 0}, 1.0),
        ("onecycle", {"div_factor": 4, "final_div_factor": 10}, 1 / 40),
        ("onecycle", {"pct_start": 1}, 1.0),
        ("constant", {}, 1.0),
        ("step", {"gamma": 0.1, "decay_steps": 1}, 0.0),
        ("step", {"gamma": 2, "decay_steps": 1e-320}, math.inf),
        ("exponential", {"gamma": 2}, math.inf),
        ("exponential", {"gamma": 0}, 0.0),
        ("multistep", {M1: 10.5, "gamma": 0.5}, 0.5),
    ],
)
def test_beyond_the_end_a_schedule_goes_on_without_an_error(schedule: str, values: dict[str, Any], end: float) -> None:
    assert lr_multiplier(schedule, 10**6, NUM_STEPS, resolve(schedule, **values)) == pytest.approx(end, rel=1e-9)


VALUES = {
    **dict.fromkeys(("warmup_steps", "decay_steps", *MILESTONES), st.floats(0, 90) | st.integers(0, 90)),
    **dict.fromkeys(("gamma", "power"), st.floats(0, 2)),
    **dict.fromkeys(("final_fraction", "pct_start"), st.floats(0, 1)),
    **dict.fromkeys(("div_factor", "final_div_factor"), st.floats(0.1, 1e5)),
}


@st.composite
def schedules_with_values(draw: st.DrawFn) -> tuple[str, dict[str, float]]:
    schedule = draw(st.sampled_from(sorted(SCHEDULE_DEFAULTS)))
    names = set(known_hyperparameters("sgd", schedule)) & set(VALUES)
    values = {name: draw(VALUES[name]) for name in sorted(names)}
    if schedule == "exponential":
        values["decay_steps"] += 0.5
    return schedule, resolve(schedule, **values)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(drawn=schedules_with_values(), num_steps=st.integers(1, 80))
def test_a_rate_is_a_number_of_0_or_more_at_every_step(drawn: tuple[str, dict[str, float]], num_steps: int) -> None:
    schedule, values = drawn
    for step in range(num_steps + 5):
        factor = lr_multiplier(schedule, step, num_steps, values)
        assert isinstance(factor, float)
        assert factor >= 0


def rates(
    drawn: tuple[str, dict[str, float]], num_steps: int, pieces: list[list[tuple[int, int]]]
) -> list[list[float]]:
    """What every lane's parameter lost at each of its steps, where each piece is a bundle of (lane, step) rows."""
    schedule, values = drawn
    layout = FlatLayout.of(torch.nn.Linear(1, 1, bias=False).double())
    moved: dict[int, list[float]] = {}
    for piece in pieces:
        optimizer = FusedOptimizer("sgd", schedule, num_steps, layout, {"weight": ParamRule("fixed")}, used=())
        flat_FP = torch.zeros(len(piece), layout.row_size, dtype=torch.float64)
        optimizer.update(flat_FP, torch.ones_like(flat_FP), {}, [LaneSettings(step, values) for _, step in piece])
        for (lane, _), rate in zip(piece, (-flat_FP[:, 0]).tolist(), strict=True):
            moved.setdefault(lane, []).append(rate)
    return list(moved.values())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(drawn=schedules_with_values(), num_steps=st.integers(2, 25), data=st.data())
def test_neither_resuming_nor_stopping_lanes_resets_a_schedule(
    drawn: tuple[str, dict[str, float]], num_steps: int, data: st.DataObject
) -> None:
    """A lane that begins later, whose company leaves, and that another process goes on with, has the same rates."""
    start = data.draw(st.integers(0, num_steps - 1))
    leaves = data.draw(st.integers(start, num_steps))
    together = [[(0, step)] for step in range(start)]
    together += [[(0, step), (1, step - start)] for step in range(start, leaves)]
    together += [[(1, step - start)] for step in range(leaves, num_steps + start)]
    found = rates(drawn, num_steps, together)
    alone = rates(drawn, num_steps, [[(0, step)] for step in range(num_steps)])[0]
    assert found[-1] == alone
    assert all(lane == alone[: len(lane)] for lane in found)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"schedule": "onecycle", "fixed": {"warmup_steps": 5}}, "a warm-up of its own.*pct_start"),
        ({"schedule": "onecycle", "fixed": {"pct_start": 1.5}}, "'pct_start': got 1.5, needed a number from 0 to 1"),
        ({"schedule": "onecycle", "fixed": {"div_factor": 0}}, "'div_factor': got 0, needed a number above 0"),
        ({"schedule": "onecycle", "fixed": {"final_div_factor": 0}}, "'final_div_factor': got 0"),
        ({"schedule": "exponential"}, "no 'gamma', which schedule 'exponential' needs"),
        ({"schedule": "exponential", "fixed": {"gamma": 0.9, "decay_steps": 0}}, "needed a number above 0"),
        ({"schedule": "multistep", "fixed": {"milestone_1": -3}}, "'milestone_1': got -3"),
        ({"schedule": "multistep", "fixed": {"milestone_5": 3}}, "unknown; optimizer"),
        ({"schedule": "polynomial", "fixed": {"power": -1}}, "'power': got -1"),
        ({"schedule": "polynomial", "fixed": {"power": True}}, "'power': got True, needed a number of 0 or more"),
        ({"schedule": "step", "fixed": {"gamma": -0.1}}, "'gamma': got -0.1"),
        ({"schedule": "cosine", "fixed": {"gamma": 0.1}}, "unknown"),
    ],
)
def test_what_a_schedule_cannot_use_is_refused(make_study: MakeStudy, fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(StudyError, match=complaint):
        make_study(**fields)
    with pytest.raises(StudyError):
        resolve_hyperparameters("adam", fields["schedule"], fields.get("fixed", {}), {"lr": 0.1})


def test_a_space_may_mix_whole_and_broken_numbers(make_study: MakeStudy) -> None:
    study = make_study(
        schedule="multistep",
        space={
            "lr": hydro.Float(1e-4, 1e-1, log=True),
            "milestone_1": hydro.Int(5, 20),
            "milestone_2": hydro.Float(20, 40),
            "milestone_3": hydro.Categorical([0, 35, 36.5]),
            "warmup_steps": hydro.Int(0, 10),
        },
        fixed={"gamma": 0.5},
    )
    params = {"lr": 0.1, "milestone_1": 7, "milestone_2": 20.5, "milestone_3": 36.5}
    values = resolve_hyperparameters(study.optimizer, study.schedule, study.fixed, params)
    assert [lr_multiplier("multistep", step, 40, values) for step in (6, 7, 20, 21, 37)] == [1, 0.5, 0.5, 0.25, 0.125]
