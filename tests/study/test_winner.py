"""The winner as code: it runs on an unmodified model and makes what the configuration says."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from hydro_slurm.study.winner import winner_code


@pytest.mark.parametrize(
    ("optimizer", "kind", "params", "expected"),
    [
        ("sgd", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": 1}, {"momentum": 0.9, "nesterov": True}),
        ("adam", torch.optim.Adam, {"lr": 0.1, "beta1": 0.8}, {"betas": (0.8, 0.999)}),
        ("adamw", torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.3}, {"weight_decay": 0.3}),
        ("rmsprop", torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.5}, {"momentum": 0.5}),
        ("adagrad", torch.optim.Adagrad, {"lr": 0.1, "eps": 1e-6}, {"eps": 1e-6}),
    ],
)
def test_the_code_makes_the_configuration(
    optimizer: str, kind: type[torch.optim.Optimizer], params: dict[str, Any], expected: dict[str, Any]
) -> None:
    names: dict[str, Any] = {"model": nn.Linear(2, 2)}
    exec(winner_code(optimizer, "constant", {}, params, steps=30, batch_size=8), names)
    assert isinstance(names["optimizer"], kind)
    settings = names["optimizer"].defaults
    assert settings["lr"] == 0.1
    assert {name: settings[name] for name in expected} == expected
    assert "schedule" not in names


LINEAR_RISE: Any = lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))  # noqa: E731


@pytest.mark.parametrize(
    ("schedule", "fixed", "expected"),
    [
        ("constant", {"warmup_steps": 5.0}, LINEAR_RISE),
        ("cosine", {"final_fraction": 0.1}, partial(lr_scheduler.CosineAnnealingLR, T_max=30, eta_min=0.1)),
        ("step", {"gamma": 0.5}, partial(lr_scheduler.StepLR, step_size=10, gamma=0.5)),
        ("step", {"gamma": 0.5, "decay_steps": 7.0}, partial(lr_scheduler.StepLR, step_size=7, gamma=0.5)),
        (
            "multistep",
            {"milestone_1": 4, "milestone_2": 9},
            partial(lr_scheduler.MultiStepLR, milestones=[4, 9], gamma=0.1),
        ),
        ("exponential", {"gamma": 0.9}, partial(lr_scheduler.ExponentialLR, gamma=0.9)),
        ("polynomial", {"power": 2.0}, partial(lr_scheduler.PolynomialLR, total_iters=30, power=2.0)),
        ("onecycle", {}, partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=30, cycle_momentum=False)),
    ],
)
def test_the_schedule_is_torch_s_of_that_name(schedule: str, fixed: dict[str, float], expected: Any) -> None:
    names: dict[str, Any] = {"model": nn.Linear(2, 2)}
    exec(winner_code("sgd", schedule, fixed, {"lr": 1.0}, steps=30, batch_size=8), names)
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    reference = expected(optimizer)
    for _ in range(30):
        assert names["schedule"].get_last_lr()[0] == pytest.approx(reference.get_last_lr()[0], abs=1e-7)
        for each in (names["optimizer"], optimizer):
            each.step()
        if reference.last_epoch < 29:
            names["schedule"].step()
            reference.step()


def test_what_has_no_class_in_torch_is_said() -> None:
    code = winner_code("lion", "constant", {"clip_norm": 1.0}, {"lr": 0.1, "beta1": 0.9}, steps=30, batch_size=8)
    assert "pip install lion-pytorch" in code
    assert "Lion(model.parameters(), lr=0.1, betas=(0.9, 0.99))" in code
    assert "clip_grad_norm_(model.parameters(), 1.0)" in code
