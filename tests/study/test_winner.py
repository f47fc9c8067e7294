"""The winner as code: it runs on an unmodified model and makes what the configuration says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hydro_slurm.study.winner import winner_code
from hydro_trials.hyperparameters import SCHEDULE_DEFAULTS, lr_multiplier


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


@pytest.mark.parametrize(
    ("schedule", "fixed"),
    [
        ("cosine", {"final_fraction": 0.1, "warmup_steps": 4.0}),
        ("step", {"gamma": 0.5}),
        ("step", {"gamma": 0.5, "decay_steps": 7.0}),
        ("constant", {"warmup_steps": 5.0}),
    ],
)
def test_the_schedule_is_the_study_s(schedule: str, fixed: dict[str, float]) -> None:
    names: dict[str, Any] = {"model": nn.Linear(2, 2)}
    exec(winner_code("sgd", schedule, fixed, {"lr": 1.0}, steps=30, batch_size=8), names)
    values = {**SCHEDULE_DEFAULTS[schedule], **fixed}
    for step in range(30):
        assert names["schedule"].get_last_lr()[0] == pytest.approx(lr_multiplier(schedule, step, 30, values))
        names["optimizer"].step()
        names["schedule"].step()
