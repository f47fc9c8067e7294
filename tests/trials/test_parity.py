"""No one can tell a lane from a trial that was trained by itself: every entry of the table, every way of running lanes.

Lanes are split off, merged, dropped and admitted again from their state, and joined by a latecomer on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from alone import train_alone
from parity_table import LAYERS, NUM_CLASSES, OPTIMIZERS, SCHEDULES, VOCABULARY, Entry
from torch import Tensor, nn
from torch.nn import functional as F

import hydro_trials as hydro
from hydro_trials.fusion import FusedTrainer, LaneState
from hydro_trials.hyperparameters import FLAGS, resolve_hyperparameters
from hydro_trials.surrogate import make_surrogate

NUM_STEPS = 50
SEEDS = (11, 12, 13, 14)

MakeStudy = Callable[..., hydro.Study]


def classify(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(output).flatten(0, -2), target.flatten())


def logits_of(output: Any) -> Tensor:
    logits: Tensor = getattr(output, "logits", output)
    return logits


def make_data(entry: Entry, dtype: torch.dtype = torch.float64) -> hydro.Data:
    generator = torch.Generator().manual_seed(3)
    if entry.words:
        x = torch.randint(0, VOCABULARY, (90, *entry.shape), generator=generator)
    else:
        x = torch.randn(90, *entry.shape, generator=generator, dtype=torch.float64).to(dtype)
    shape = (90, *entry.shape) if entry.per_word else (90,)
    y = torch.randint(0, VOCABULARY if entry.per_word else NUM_CLASSES, shape, generator=generator)
    return hydro.Data(train=(x[:70], y[:70]), valid=(x[70:], y[70:]))


def make_trainer(study: hydro.Study, data: hydro.Data, kind: str) -> FusedTrainer:
    surrogate = make_surrogate(study.build, 1.0, study.optimizer)
    return FusedTrainer(study, surrogate, data, study.steps, lambda site: None, kind=kind)


def run(trainer: FusedTrainer, num_steps: int) -> None:
    for _ in range(num_steps):
        trainer.step()


def train_with_changes(entry: Entry, study: hydro.Study, data: hydro.Data, kind: str) -> dict[int, dict[str, Tensor]]:
    """Four lanes of 50 steps each, none of which has the same company all the way; what each one ends as."""

    def admit(trial: int, state: LaneState | None = None) -> None:
        values = resolve_hyperparameters(study.optimizer, study.schedule, study.fixed, entry.lanes[trial])
        trainer.admit(trial, SEEDS[trial], values, state)

    trainer = make_trainer(study, data, kind)
    for trial in range(3):
        admit(trial)
    run(trainer, 10)
    split = trainer.split([1])
    run(split, 7)
    admit(3)
    run(trainer, 5)
    trainer.merge(split)
    run(trainer, 8)
    stopped = trainer.state(0)
    trainer.drop([0])
    run(trainer, 6)
    admit(0, stopped)
    finished: dict[int, dict[str, Tensor]] = {}
    while trainer.lanes:
        run(trainer, NUM_STEPS - max(lane.step for lane in trainer.lanes))
        done = [lane.trial for lane in trainer.lanes if lane.step == NUM_STEPS]
        finished.update((trial, trainer.export(trial)) for trial in done)
        trainer.drop(done)
    assert trainer.refusal is None
    return finished


def assert_near(found: Tensor, expected: Tensor, bound: float, what: str) -> None:
    """Equal up to a share of the largest value."""
    if not expected.is_floating_point():
        assert torch.equal(found, expected), what
        return
    distance = float((found - expected).detach().abs().max())
    assert distance <= bound * float(expected.detach().abs().max()), f"{what}: off by {distance:.1e}"


CASES = [
    pytest.param(entry, kind, id=f"{entry.name} {kind}")
    for entry in (*LAYERS, *OPTIMIZERS, *SCHEDULES)
    for kind in ("general", "separate", *(("fast",) if entry.fast else ()))
    if kind != "separate" or entry in LAYERS
]


@pytest.mark.parametrize(("entry", "kind"), CASES)
def test_lanes_equal_trials_that_were_trained_by_themselves(make_study: MakeStudy, entry: Entry, kind: str) -> None:
    def build(width: float) -> nn.Module:
        return entry.build().double()

    space: dict[str, Any] = {}
    for name in sorted({name for lane in entry.lanes for name in lane}):
        values = sorted({lane[name] for lane in entry.lanes if name in lane})
        space[name] = hydro.Categorical([False, True] if name in FLAGS else values)
    settings = {"space": space, "loss": classify, "batch_size": 8, "steps": NUM_STEPS, **entry.fields}
    study = make_study(build=build, **settings)
    data = make_data(entry)
    finished = train_with_changes(entry, study, data, kind)
    surrogate = make_surrogate(build, 1.0, study.optimizer)
    for trial, params in enumerate(entry.lanes):
        alone = train_alone(study, surrogate, data, SEEDS[trial], params, NUM_STEPS)
        for name, expected in alone.state_dict().items():
            if not any(part in name for part in entry.vanishing):
                assert_near(finished[trial][name], expected, entry.bound, f"trial {trial} {name}")
        plain = build(1.0)
        plain.load_state_dict(finished[trial])
        with torch.no_grad():
            outputs = [logits_of(module.eval()(data.valid[0])) for module in (plain, alone)]
        assert_near(outputs[0], outputs[1], entry.bound, f"trial {trial} output")


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        pytest.param(entry, kind, id=f"{entry.name} {kind}")
        for entry in LAYERS
        for kind in ("general", *(("fast",) if entry.fast else ()))
    ],
)
def test_in_float32_lanes_drift_from_trials_by_rounding_alone(make_study: MakeStudy, entry: Entry, kind: str) -> None:
    fields = {"optimizer": "sgd", "loss": classify, "batch_size": 8, "steps": 20}
    study = make_study(build=lambda width: entry.build(), **fields)
    data = make_data(entry, torch.float32)
    trainer = make_trainer(study, data, kind)
    for trial, lr in enumerate((0.01, 0.03)):
        trainer.admit(trial, SEEDS[trial], resolve_hyperparameters("sgd", "constant", {}, {"lr": lr}))
    run(trainer, 20)
    surrogate = make_surrogate(study.build, 1.0, "sgd")
    for trial, lr in enumerate((0.01, 0.03)):
        alone = train_alone(study, surrogate, data, SEEDS[trial], {"lr": lr}, 20).state_dict()
        found = trainer.export(trial)
        for name, expected in alone.items():
            assert_near(found[name], expected, entry.single_bound, f"trial {trial} {name}")
