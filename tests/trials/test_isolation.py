"""Nothing that happens to a lane reaches another: not a bit of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from alone import train_alone
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hydro_trials as hydro
from hydro_slurm.errors import FusionError
from hydro_trials.fusion import FusedTrainer, LaneState
from hydro_trials.hyperparameters import resolve_hyperparameters
from hydro_trials.surrogate import make_surrogate

MakeStudy = Callable[..., hydro.Study]

MODELS: dict[str, Callable[[], nn.Module]] = {
    "norms and dropout": lambda: nn.Sequential(
        nn.Linear(12, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 5)
    ),
    "batch norm": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 5),
    ),
}


def make_trainer(study: hydro.Study, data: hydro.Data, lanes: list[dict[str, float]]) -> FusedTrainer:
    trainer = FusedTrainer(study, make_surrogate(study.build, 1, study.optimizer), data, study.steps, lambda site: None)
    for trial, params in enumerate(lanes):
        admit(trainer, trial, params)
    return trainer


def admit(trainer: FusedTrainer, trial: int, params: dict[str, float], state: LaneState | None = None) -> None:
    study = trainer.study
    trainer.admit(trial, 50 + trial, resolve_hyperparameters(study.optimizer, study.schedule, {}, params), state)


def run(trainer: FusedTrainer, num_steps: int) -> FusedTrainer:
    for _ in range(num_steps):
        trainer.step()
    return trainer


def assert_same_bits(one: FusedTrainer, other: FusedTrainer, trials: list[int]) -> None:
    for trial in trials:
        states = [dataclasses.asdict(trainer.state(trial)) for trainer in (one, other)]
        torch.testing.assert_close(states[0], states[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop", "adagrad", "lion"])
@pytest.mark.parametrize("trouble", [{"lr": 1e30}, {"lr": 1e4}, {"lr": 0.01, "clip_norm": 1e-30}])
@pytest.mark.parametrize("kind", ["general", "fast"])
def test_a_lane_in_trouble_leaves_the_others_their_bits(
    make_study: MakeStudy, data: hydro.Data, model: str, optimizer: str, trouble: dict[str, float], kind: str
) -> None:
    """Not a number, infinite, exploding, or clipped to nothing."""
    space = {"lr": hydro.Float(1e-5, 1, log=True), "clip_norm": hydro.Float(0, 10), "clip_value": hydro.Float(0, 10)}
    study = make_study(build=lambda width: MODELS[model](), optimizer=optimizer, space=space)
    calm: dict[str, float] = {"lr": 0.01}
    others = [{"lr": 0.003, "clip_norm": 1.0}, {"lr": 0.02, "clip_value": 0.1}]
    healthy = make_trainer(study, data, [others[0], calm, others[1]])
    sick = make_trainer(study, data, [others[0], trouble, others[1]])
    for trainer in (healthy, sick):
        trainer.use(kind)
        run(trainer, 12)
    assert_same_bits(sick, healthy, [0, 2])
    weight = "0.weight" if model == "norms and dropout" else "1.weight"
    assert not torch.equal(sick.state(1).parameters[weight], healthy.state(1).parameters[weight]), "no trouble at all"


@pytest.mark.parametrize("model", MODELS)
def test_a_lane_s_draws_do_not_depend_on_its_row(make_study: MakeStudy, data: hydro.Data, model: str) -> None:
    study = make_study(build=lambda width: MODELS[model]())
    lanes = [{"lr": 0.01}, {"lr": 0.02}, {"lr": 0.03}]
    forward = make_trainer(study, data, lanes)
    backward = make_trainer(study, data, [])
    for trial in (2, 1, 0):
        admit(backward, trial, lanes[trial])
    assert_same_bits(run(forward, 10), run(backward, 10), [0, 1, 2])


def build_drawn(depth: int, width: int, dropout: float, normed: bool) -> nn.Module:
    layers: list[nn.Module] = []
    size = 12
    for _ in range(depth):
        layers += [nn.Linear(size, width), *([nn.LayerNorm(width)] if normed else []), nn.Tanh(), nn.Dropout(dropout)]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, 5)).double()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    depth=st.integers(0, 2),
    width=st.integers(1, 9),
    dropout=st.sampled_from([0.0, 0.3]),
    normed=st.booleans(),
    optimizer=st.sampled_from(["sgd", "adam", "adamw", "rmsprop", "adagrad", "lion"]),
    kind=st.sampled_from(["general", "fast", "separate"]),
    lrs=st.lists(st.floats(1e-4, 1e-1), min_size=1, max_size=5),
    stops=st.lists(st.integers(1, 12), min_size=5, max_size=5),
    decay=st.sampled_from([0.0, 0.01]),
    accumulate=st.integers(1, 2),
)
def test_any_lanes_that_stop_at_any_time_equal_trials_by_themselves(
    depth: int,
    width: int,
    dropout: float,
    normed: bool,
    optimizer: str,
    kind: str,
    lrs: list[float],
    stops: list[int],
    decay: float,
    accumulate: int,
) -> None:
    def data() -> hydro.Data:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(40, 12, generator=generator, dtype=torch.float64)
        return hydro.Data(train=(x, x[:, :5].argmax(1)), valid=(x, x[:, :5].argmax(1)))

    study = hydro.Study(
        name="drawn",
        build=lambda factor: build_drawn(depth, width, dropout, normed),
        data=data,
        loss=nn.functional.cross_entropy,
        space={"lr": hydro.Float(1e-4, 1e-1)},
        fixed={"weight_decay": decay},
        optimizer=optimizer,
        batch_size=8,
        steps=12,
        accumulate=accumulate,
    )
    samples = data()
    trainer = make_trainer(study, samples, [])
    trainer.use(kind)
    for trial, lr in enumerate(lrs):
        values = resolve_hyperparameters(optimizer, "constant", study.fixed, {"lr": lr})
        trainer.admit(trial, trial, values)
    surrogate = make_surrogate(study.build, 1, optimizer)
    for step in range(1, 13):
        trainer.step()
        for trial in [lane.trial for lane in trainer.lanes if stops[lane.trial] == step]:
            found = trainer.export(trial)
            trainer.drop([trial])
            alone = train_alone(study, surrogate, samples, trial, {"lr": lrs[trial]}, step)
            for name, expected in alone.state_dict().items():
                bound = 1e-9 * float(expected.abs().max()) + 1e-12
                assert float((found[name] - expected).abs().max()) <= bound, (trial, name)
        if not trainer.lanes:
            break


def bf16_error(make_study: MakeStudy, data: hydro.Data, kind: str) -> float:
    study = make_study(
        build=lambda width: MODELS["batch norm"](), precision="bf16", optimizer="sgd", fixed={"momentum": 0.9}
    )
    trainer = make_trainer(study, data, [])
    trainer.use(kind)
    for trial in range(3):
        trainer.admit(trial, 50 + trial, resolve_hyperparameters("sgd", "constant", study.fixed, {"lr": 0.01}))
    assert trainer.layout.dtype == torch.float32, "master weights keep their type"
    run(trainer, 20)
    surrogate = make_surrogate(study.build, 1, "sgd")
    errors = []
    for trial in range(3):
        alone = train_alone(study, surrogate, data, 50 + trial, {"lr": 0.01}, 20)
        found = trainer.export(trial)
        expected = {name: value for name, value in alone.state_dict().items() if value.is_floating_point()}
        errors += [float((found[n] - v).abs().max() / v.abs().max()) for n, v in expected.items() if n != "1.bias"]
    return max(errors)


@pytest.mark.parametrize("kind", ["general", "separate"])
def test_bf16_keeps_to_the_rounding_of_bf16(make_study: MakeStudy, data: hydro.Data, kind: str) -> None:
    """Twenty steps, each with a relative rounding of 2 ** -8 that sums in another order: some percent, no more."""
    assert bf16_error(make_study, data, kind) < 0.05


def test_bf16_computes_in_bf16(make_study: MakeStudy, data: hydro.Data) -> None:
    seen: list[torch.dtype] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(output.dtype)
        return nn.functional.cross_entropy(output.float(), target)

    study = make_study(precision="bf16", loss=loss)
    run(make_trainer(study, data, [{"lr": 0.01}]), 1)
    assert seen == [torch.bfloat16]


def test_merging_what_does_not_belong_together_is_refused_and_changes_nothing(
    make_study: MakeStudy, data: hydro.Data
) -> None:
    study = make_study()
    one, other = make_trainer(study, data, [{"lr": 0.01}]), make_trainer(study, data, [{"lr": 0.02}])
    with pytest.raises(FusionError, match=r"trials \[0\] are in both bundles"):
        one.merge(other)
    stranger = make_trainer(dataclasses.replace(study, optimizer="sgd"), data, [])
    with pytest.raises(FusionError, match="different studies"):
        one.merge(stranger)
    assert (one.trials, other.trials) == ([0], [0])
