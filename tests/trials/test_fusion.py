"""Fused lanes: equal to separate training, deaf to each other, and cut into quanta."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hydro_trials as hydro
from hydro_slurm.errors import FusionError
from hydro_trials.fusion import FusedTrainer, LaneState
from hydro_trials.fusion.batch import LaneBatch
from hydro_trials.fusion.general import GeneralProgram
from hydro_trials.fusion.layout import FlatLayout
from hydro_trials.fusion.optimizers import SEGMENT_VALUES, FusedOptimizer, LaneSettings
from hydro_trials.fusion.program import boundary_modules
from hydro_trials.fusion.streams import SampleStream, derive_seed
from hydro_trials.hyperparameters import resolve_hyperparameters
from hydro_trials.schedules import lr_multiplier
from hydro_trials.surrogate import ParamRule, Surrogate, make_surrogate

MakeStudy = Callable[..., hydro.Study]

SPREAD = [
    {"lr": 1e-3},
    {"lr": 3e-2},
    {"lr": 1e-2},
    {"lr": 2e-3},
    {"lr": 5e-3},
    {"lr": 7e-3},
    {"lr": 4e-4},
    {"lr": 2e-2},
]


def build_mlp(width: float) -> nn.Module:
    size = round(32 * width)
    return nn.Sequential(nn.Linear(12, size), nn.ReLU(), nn.LayerNorm(size), nn.Linear(size, size), nn.Linear(size, 5))


def build_cnn(width: float) -> nn.Module:
    """With BatchNorm: running statistics are buffers."""
    size = round(8 * width)
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)),
        nn.Conv2d(1, size, 3, padding=1),
        nn.BatchNorm2d(size),
        nn.ReLU(),
        nn.Conv2d(size, size, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(size, 5),
    )


def make_trainer(
    study: hydro.Study, data: hydro.Data, check: Callable[[int], None] = lambda site: None, scale: float = 1.0
) -> FusedTrainer:
    return FusedTrainer(study, make_surrogate(study.build, scale, study.optimizer), data, study.steps, check)


def admit(trainer: FusedTrainer, trial: int, params: dict[str, float], state: LaneState | None = None) -> None:
    study = trainer.study
    values = resolve_hyperparameters(study.optimizer, study.schedule, study.fixed, params)
    trainer.admit(trial, 100 + trial, values, state)


def run(trainer: FusedTrainer, num_steps: int) -> FusedTrainer:
    for _ in range(num_steps):
        trainer.step()
    return trainer


def assert_equal(state: LaneState, other: LaneState) -> None:
    """Bit for bit."""
    assert state.step == other.step
    torch.testing.assert_close(dataclasses.asdict(state), dataclasses.asdict(other), rtol=0, atol=0, equal_nan=True)


def train_alone(
    study: hydro.Study, surrogate: Surrogate, data: hydro.Data, seed: int, params: dict[str, Any], num_steps: int
) -> nn.Module:
    """The separate computation: torch.optim, one model, an ordinary loop."""
    values = resolve_hyperparameters(study.optimizer, study.schedule, study.fixed, params)
    model = surrogate.make(derive_seed(seed, "init"))
    groups = []
    for name, parameter in model.named_parameters():
        rule = surrogate.rules[name]
        group = {"params": [parameter], "lr": values["lr"] * rule.lr, "factor": rule.lr}
        group["weight_decay"] = values["weight_decay"] * rule.weight_decay
        if study.optimizer != "sgd":
            group["eps"] = values["eps"] * rule.eps
        groups.append(group)
    optimizer: torch.optim.Optimizer
    if study.optimizer == "sgd":
        nesterov = bool(values["nesterov"])
        optimizer = torch.optim.SGD(groups, lr=values["lr"], momentum=values["momentum"], nesterov=nesterov)
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[study.optimizer]
        optimizer = kind(groups, lr=values["lr"], betas=(values["beta1"], values["beta2"]))
    order = study.seed if study.data_order == "shared" else seed
    stream = SampleStream(order, len(data.train[0]), study.batch_size)
    for step in range(num_steps):
        multiplier = lr_multiplier(study.schedule, step, study.steps, values)
        for group in optimizer.param_groups:
            group["lr"] = values["lr"] * group["factor"] * multiplier
        index = stream.indices(step)
        optimizer.zero_grad()
        study.loss(model(data.train[0][index]), data.train[1][index]).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize(
    ("optimizer", "lanes"),
    [
        ("sgd", [{"lr": 0.1}, {"lr": 0.02}]),
        (
            "sgd",
            [
                {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
                {"lr": 0.05, "momentum": 0.5, "weight_decay": 1e-3},
                {"lr": 0.1},
            ],
        ),
        ("adam", [{"lr": 1e-2}, {"lr": 1e-3, "beta1": 0.5, "beta2": 0.9, "weight_decay": 0.1, "eps": 1e-3}]),
        ("adamw", [{"lr": 1e-2, "weight_decay": 0.3}, {"lr": 1e-3, "weight_decay": 0.0, "eps": 1e-2}]),
    ],
)
@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_lanes_equal_separate_training_in_float64(
    make_study: MakeStudy,
    data64: hydro.Data,
    optimizer: str,
    lanes: list[dict[str, Any]],
    schedule: str,
    scale: int,
) -> None:
    names = {name for params in lanes for name in params}
    space = {name: hydro.Categorical([params[name] for params in lanes if name in params]) for name in names}
    study = make_study(build=lambda w: build_mlp(w).double(), optimizer=optimizer, schedule=schedule, space=space)
    trainer = make_trainer(study, data64, scale=scale)
    for trial, params in enumerate(lanes):
        admit(trainer, trial, params)
    run(trainer, 25)
    for trial, params in enumerate(lanes):
        alone = train_alone(study, trainer.surrogate, data64, 100 + trial, params, 25)
        found = trainer.state(trial).parameters
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(found[name], parameter.detach(), rtol=0, atol=1e-9)


def test_batch_norm_equals_separate_training(make_study: MakeStudy, data64: hydro.Data) -> None:
    study = make_study(build=lambda w: build_cnn(w).double(), optimizer="sgd")
    trainer = make_trainer(study, data64)
    admit(trainer, 0, {"lr": 0.1})
    admit(trainer, 1, {"lr": 0.01})
    run(trainer, 15)
    for trial, lr in ((0, 0.1), (1, 0.01)):
        alone = train_alone(study, trainer.surrogate, data64, 100 + trial, {"lr": lr}, 15)
        state = trainer.state(trial)
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close({**state.parameters, **state.buffers}[name], tensor, rtol=0, atol=1e-9)
        alone.eval()
        with torch.no_grad():
            value = float(study.loss(alone(data64.valid[0]), data64.valid[1]))
        assert trainer.evaluate([trial])[trial]["valid.loss"] == pytest.approx(value, abs=1e-9)


def test_a_lane_s_gradient_is_that_of_its_own_loss(make_study: MakeStudy, data: hydro.Data) -> None:
    """The sum over lanes, not the mean: the first plain SGD step of a lane does not depend on how many there are."""
    study = make_study(optimizer="sgd")
    moved = []
    for num_lanes in (1, 4):
        trainer = make_trainer(study, data)
        for trial in range(num_lanes):
            admit(trainer, trial, {"lr": 0.1})
        before = trainer.state(0).parameters
        run(trainer, 1)
        moved.append(trainer.state(0).parameters["0.weight"] - before["0.weight"])
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rows", [range(7), [3, 1], [2, 5, 7], [4]])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_lane_is_bit_equal_whatever_other_lanes_there_are(
    make_study: MakeStudy, data: hydro.Data, optimizer: str, rows: list[int]
) -> None:
    """Any number, any order, alone too: rows and company leave no trace in float32."""
    fixed = {"weight_decay": 1e-3, **({"momentum": 0.9} if optimizer == "sgd" else {})}
    study = make_study(build=build_mlp, optimizer=optimizer, fixed=fixed)
    full = make_trainer(study, data, scale=2)
    for trial, params in enumerate(SPREAD):
        admit(full, trial, params)
    few = make_trainer(study, data, scale=2)
    for trial in rows:
        admit(few, trial, SPREAD[trial])
    run(full, 12)
    run(few, 12)
    metrics = full.evaluate(full.trials)
    for trial in rows:
        assert_equal(few.state(trial), full.state(trial))
        assert few.evaluate([trial])[trial] == metrics[trial]


@pytest.mark.parametrize("build", [build_mlp, build_cnn])
def test_a_lane_that_goes_nan_leaves_the_others_bit_equal(
    make_study: MakeStudy, data: hydro.Data, build: Callable[[float], nn.Module]
) -> None:
    study = make_study(build=build, optimizer="sgd", fixed={"momentum": 0.5})
    trainers = []
    for bad_lr in (0.01, 1e30):
        trainer = make_trainer(study, data)
        for trial in range(8):
            admit(trainer, trial, {"lr": bad_lr if trial == 3 else 0.01 * (trial + 1)})
        trainers.append(run(trainer, 10))
    healthy, sick = trainers
    found = sick.diverged(thorough=True)
    assert list(found) == [3]
    assert found[3][1].startswith("training loss was not finite at step")
    assert healthy.diverged(thorough=True) == {}
    for trial in (0, 1, 2, 4, 5, 6, 7):
        assert_equal(sick.state(trial), healthy.state(trial))


def test_the_step_of_divergence_does_not_depend_on_when_it_is_looked_for(
    make_study: MakeStudy, data: hydro.Data
) -> None:
    study = make_study(optimizer="sgd")
    found = []
    for num_steps in (6, 11):
        trainer = make_trainer(study, data)
        admit(trainer, 0, {"lr": 1e30})
        found.append(run(trainer, num_steps).diverged(thorough=False)[0])
    assert found[0] == found[1]


def test_dropping_and_refilling_lanes_keeps_the_others_state(make_study: MakeStudy, data: hydro.Data) -> None:
    study = make_study(build=build_mlp)
    steady = make_trainer(study, data)
    changing = make_trainer(study, data)
    for trial in range(4):
        admit(changing, trial, SPREAD[trial])
    admit(steady, 2, SPREAD[2])
    run(changing, 5)
    changing.drop({0, 3})
    run(changing, 4)
    admit(changing, 7, SPREAD[7])
    changing.drop({1})
    run(changing, 6)
    run(steady, 15)
    assert changing.trials == [2, 7]
    assert changing.lane(7).step == 6
    assert_equal(changing.state(2), steady.state(2))


@pytest.mark.parametrize("build", [build_mlp, build_cnn])
def test_a_lane_that_resumes_is_bit_equal_to_one_that_never_stopped(
    make_study: MakeStudy, data: hydro.Data, build: Callable[[float], nn.Module]
) -> None:
    study = make_study(build=build, schedule="cosine")
    whole = make_trainer(study, data)
    first = make_trainer(study, data)
    for trial in range(3):
        admit(whole, trial, SPREAD[trial])
        admit(first, trial, SPREAD[trial])
    run(whole, 20)
    run(first, 9)
    second = make_trainer(study, data)
    for trial in range(3):
        admit(second, trial, SPREAD[trial], copy.deepcopy(first.state(trial)))
    run(second, 11)
    for trial in range(3):
        assert_equal(second.state(trial), whole.state(trial))


def test_a_copy_of_a_lane_holds_only_that_lane(make_study: MakeStudy, data: hydro.Data) -> None:
    trainer = make_trainer(make_study(build=build_cnn), data)
    for trial in range(8):
        admit(trainer, trial, SPREAD[trial])
    state = run(trainer, 1).state(5)
    tensors = [*state.parameters.values(), *state.buffers.values()]
    tensors += [tensor for slot in state.optimizer.values() for tensor in slot.values()]
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize("build", [build_mlp, build_cnn])
def test_a_step_that_is_broken_off_at_any_boundary_can_be_done_again(
    make_study: MakeStudy, data: hydro.Data, build: Callable[[float], nn.Module]
) -> None:
    study = make_study(build=build)
    steady = make_trainer(study, data)
    countdown = [-1]

    def check(site: int) -> None:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise InterruptionError

    broken = make_trainer(study, data, check)
    for trainer in (steady, broken):
        for trial in range(3):
            admit(trainer, trial, SPREAD[trial])
    num_broken = 0
    for boundary in range(1, 40):
        countdown[0] = boundary
        try:
            broken.step()
        except InterruptionError:
            num_broken += 1
            countdown[0] = -1
            broken.step()
        steady.step()
    assert num_broken >= 2 * len(boundary_modules(broken.surrogate.make(0)))
    for trial in range(3):
        assert_equal(broken.state(trial), steady.state(trial))


def test_an_interruption_inside_the_update_waits_until_the_update_is_whole(
    make_study: MakeStudy, data: hydro.Data
) -> None:
    size = 300  # so that eight lanes do not fit one segment

    def build(width: float) -> nn.Module:
        return nn.Sequential(nn.Linear(12, round(size * width)), nn.Linear(round(size * width), 5))

    study = make_study(build=build)
    armed = [False]

    def check(site: int) -> None:
        if armed[0]:
            raise InterruptionError

    trainer, steady = make_trainer(study, data, check), make_trainer(study, data)
    assert trainer.layout.row_size * 8 < SEGMENT_VALUES * 10
    for trial in range(24):
        admit(trainer, trial, {"lr": 1e-3})
        admit(steady, trial, {"lr": 1e-3})
    assert trainer.layout.row_size * 24 > SEGMENT_VALUES
    update = trainer.optimizer.update

    def arm(*arguments: Any) -> None:
        armed[0] = True
        update(*arguments)

    trainer.optimizer.update = arm  # type: ignore[method-assign]
    with pytest.raises(InterruptionError):
        trainer.step()
    assert not trainer.torn
    steady.step()
    for trial in range(24):
        assert_equal(trainer.state(trial), steady.state(trial))


@pytest.mark.parametrize("use_unwrap", [True, False])
def test_checks_fire_at_every_module_forward_and_backward(
    make_study: MakeStudy, data: hydro.Data, use_unwrap: bool
) -> None:
    """Both ways of reaching backward, with and without the private access to what vmap wraps."""
    module = build_mlp(1.0)
    num_calls = [0]

    def check(site: int) -> None:
        num_calls[0] += 1

    program = GeneralProgram(module, nn.functional.cross_entropy, check, use_unwrap=use_unwrap)
    parameters = {
        name: torch.stack([p.detach(), p.detach() * 2]).requires_grad_() for name, p in module.named_parameters()
    }
    x_FB, y_FB = data.train[0][:8].view(2, 4, 12), data.train[1][:8].view(2, 4)
    in_forward: list[int] = []
    loss = program.loss
    program.loss = lambda output, target: (in_forward.append(num_calls[0]), loss(output, target))[1]
    losses_F, gradients = program.gradients(parameters, {}, LaneBatch(x_FB, y_FB, False, (1, 2)))
    num_modules = len(boundary_modules(module))
    assert num_modules == 4
    assert in_forward == [num_modules]
    assert num_calls[0] == num_modules + 1 + num_modules  # one more between forward and backward
    for lane in range(2):
        single = {name: p.detach()[lane].clone().requires_grad_() for name, p in parameters.items()}
        value = nn.functional.cross_entropy(torch.func.functional_call(module, single, (x_FB[lane],)), y_FB[lane])
        torch.testing.assert_close(losses_F[lane], value.detach())
        for gradient, expected in zip(gradients, torch.autograd.grad(value, list(single.values())), strict=True):
            torch.testing.assert_close(gradient[lane], expected)


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inside(x)
        return y if y.sum() > 0 else -y


class MixedTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.wide = nn.Linear(12, 5), nn.Linear(12, 5).double()


class Selects(nn.Module):
    """Its output's shape depends on values, deep in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 12), Threshold())
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x))
        return y


class Threshold(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.index_fill(0, torch.nonzero(x[:, 0] > 1e9)[:, 0], 0.0)


@pytest.mark.parametrize(
    ("module", "operation", "where"),
    [
        (Decides(), "torch.Tensor.__bool__", "the model's forward"),
        (Selects(), "torch.nonzero", r"module body\.1 \(Threshold\)"),
    ],
)
def test_what_cannot_be_fused_is_named_and_trained_lane_by_lane(
    make_study: MakeStudy,
    data: hydro.Data,
    module: nn.Module,
    operation: str,
    where: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    study = make_study(build=lambda width: copy.deepcopy(module), fixed={"weight_decay": 0.1})
    trainer, separate = make_trainer(study, data), make_trainer(study, data)
    separate.use("separate")
    for each in (trainer, separate):
        for trial in range(3):
            admit(each, trial, SPREAD[trial])
        run(each, 5)
    assert trainer.refusal is not None
    assert trainer.refusal.operation == operation
    assert re.search(where, str(trainer.refusal))
    assert [record.message for record in caplog.records] == [str(trainer.refusal)]
    for trial in range(3):
        assert_equal(trainer.state(trial), separate.state(trial))


@pytest.mark.parametrize(
    ("module", "complaint"), [(MixedTypes(), "wide.weight is torch.float64"), (nn.ReLU(), "nothing to train")]
)
def test_what_cannot_be_trained_is_refused(
    make_study: MakeStudy, data: hydro.Data, module: nn.Module, complaint: str
) -> None:
    with pytest.raises(FusionError, match=complaint):
        make_trainer(make_study(build=lambda width: module), data)


def test_a_loss_per_sample_is_refused(make_study: MakeStudy, data: hydro.Data) -> None:
    study = make_study(loss=lambda output, target: nn.functional.cross_entropy(output, target, reduction="none"))
    trainer = make_trainer(study, data)
    admit(trainer, 0, {"lr": 1e-3})
    with pytest.raises(FusionError, match=r"shape \(16,\), needed a scalar"):
        trainer.step()


def test_a_foreign_checkpoint_is_refused(make_study: MakeStudy, data: hydro.Data) -> None:
    study = make_study(build=build_mlp)
    wide, narrow = make_trainer(study, data), make_trainer(study, data, scale=2)
    admit(wide, 0, {"lr": 1e-3})
    with pytest.raises(FusionError, match=r"parameter 0\.weight: got shape"):
        admit(narrow, 0, {"lr": 1e-3}, run(wide, 1).state(0))
    with pytest.raises(FusionError, match="in this bundle already"):
        admit(wide, 0, {"lr": 1e-3})
    other = make_trainer(dataclasses.replace(study, optimizer="sgd"), data)
    with pytest.raises(FusionError, match="another optimizer"):
        admit(other, 0, {"lr": 1e-3}, wide.state(0))


def test_frozen_parameters_stay(make_study: MakeStudy, data: hydro.Data) -> None:
    def build(width: float) -> nn.Module:
        model = build_mlp(width)
        model[0].requires_grad_(False)  # type: ignore[index]
        return model

    trainer = make_trainer(make_study(build=build), data)
    admit(trainer, 0, {"lr": 1e-2})
    before = trainer.state(0)
    after = run(trainer, 3).state(0)
    assert torch.equal(before.buffers["0.weight"], after.buffers["0.weight"])
    assert not torch.equal(before.parameters["3.weight"], after.parameters["3.weight"])


def test_every_epoch_is_another_permutation_of_the_samples() -> None:
    stream = SampleStream(5, 50, 10)
    epochs = [torch.cat([stream.indices(step) for step in range(5 * e, 5 * e + 5)]) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(50))
    assert epochs[0].tolist() != epochs[1].tolist()
    assert torch.equal(SampleStream(5, 50, 10).indices(12), stream.indices(12))
    assert not torch.equal(SampleStream(6, 50, 10).indices(12), stream.indices(12))


def test_segments_of_the_update_meet_without_a_seam() -> None:
    """A row longer than a segment is updated like one that is not."""
    model = nn.Linear(300, 500)
    layout = FlatLayout.of(model)
    assert layout.row_size > SEGMENT_VALUES
    rules = {name: ParamRule("fixed") for name in layout.shapes}
    optimizer = FusedOptimizer("adam", "constant", 10, layout, rules)
    torch.manual_seed(0)
    flat_FP, grad_FP = torch.randn(2, layout.row_size), torch.randn(2, layout.row_size)
    slots = {name: torch.zeros_like(flat_FP) for name in optimizer.slot_names}
    values = resolve_hyperparameters("adam", "constant", {}, {"lr": 1e-2})
    expected_FP = flat_FP - 1e-2 * grad_FP / (grad_FP.abs() + 1e-8)
    num_boundaries = [0]

    def boundary() -> None:
        num_boundaries[0] += 1

    optimizer.update(flat_FP, grad_FP, slots, [LaneSettings(0, values)] * 2, boundary)
    assert num_boundaries[0] >= 4
    torch.testing.assert_close(flat_FP, expected_FP, rtol=1e-5, atol=1e-6)
