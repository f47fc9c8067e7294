"""Models off the beaten track: what is done as torch does it, and what is refused because it would be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from alone import train_alone
from torch import Tensor, nn
from torch.nn import functional as F

import hydro_trials as hydro
from hydro_slurm.errors import FusionError
from hydro_trials.fusion import FusedTrainer
from hydro_trials.hyperparameters import resolve_hyperparameters
from hydro_trials.planner import Limits, Profiler
from hydro_trials.surrogate import make_surrogate

MakeStudy = Callable[..., hydro.Study]


def trained(study: hydro.Study, data: hydro.Data, kind: str, num_steps: int = 6) -> FusedTrainer:
    trainer = FusedTrainer(
        study, make_surrogate(study.build, 1, study.optimizer), data, study.steps, lambda site: None, kind=kind
    )
    for trial in range(3):
        values = resolve_hyperparameters(study.optimizer, study.schedule, study.fixed, {"lr": 0.01 * (trial + 1)})
        trainer.admit(trial, 30 + trial, values)
    for _ in range(num_steps):
        trainer.step()
    return trainer


def assert_equals_alone(study: hydro.Study, data: hydro.Data, trainer: FusedTrainer, num_steps: int = 6) -> None:
    surrogate = make_surrogate(study.build, 1, study.optimizer)
    for trial in range(3):
        alone = train_alone(study, surrogate, data, 30 + trial, {"lr": 0.01 * (trial + 1)}, num_steps)
        found = trainer.export(trial)
        for name, expected in alone.state_dict().items():
            assert float((found[name] - expected).abs().max()) <= 1e-9 * float(expected.abs().max()), name


class Reassigned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(12, 5)
        self.register_buffer("average", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inside(x)
        self.average = 0.9 * self.average + 0.1 * y.detach().mean(dim=0)
        return y - self.average


@pytest.mark.parametrize("kind", ["general", "separate"])
def test_a_buffer_that_forward_replaces_is_refused(make_study: MakeStudy, data: hydro.Data, kind: str) -> None:
    study = make_study(build=lambda width: Reassigned())
    with pytest.raises(FusionError, match=r"a new tensor to its buffer average, .* self\.average\.copy_"):
        trained(study, data, kind)


class Spare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(12, 5), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.used(x)
        return output


@pytest.mark.parametrize("kind", ["general", "fast", "separate"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_parameter_that_is_not_used_is_left_alone(
    make_study: MakeStudy, data64: hydro.Data, kind: str, optimizer: str
) -> None:
    study = make_study(build=lambda width: Spare().double(), optimizer=optimizer, fixed={"weight_decay": 0.1})
    assert_equals_alone(study, data64, trained(study, data64, kind))


class Held(nn.Module):
    """Its norm stays in evaluation mode while the rest trains."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.norm = nn.Linear(12, 5), nn.BatchNorm1d(5)

    def train(self, mode: bool = True) -> Held:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.norm(self.inside(x))
        return output


@pytest.mark.parametrize("kind", ["general", "fast", "separate"])
def test_a_norm_that_is_held_in_evaluation_mode_stays_there(
    make_study: MakeStudy, data64: hydro.Data, kind: str
) -> None:
    study = make_study(build=lambda width: Held().double(), optimizer="sgd")
    assert_equals_alone(study, data64, trained(study, data64, kind))


class Gumbel(nn.Module):
    def __init__(self, hard: bool) -> None:
        super().__init__()
        self.inside, self.head, self.hard = nn.Linear(12, 7), nn.Linear(7, 5), hard

    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(x)
        chosen = F.gumbel_softmax(y, tau=0.7, hard=self.hard) if self.training else y.softmax(-1)
        output: Tensor = self.head(chosen)
        return output


@pytest.mark.parametrize("kind", ["general", "separate"])
@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_draws_are_those_of_plain_torch(
    make_study: MakeStudy, data64: hydro.Data, kind: str, hard: bool
) -> None:
    study = make_study(build=lambda width: Gumbel(hard).double(), optimizer="sgd")
    trainer = trained(study, data64, kind)
    assert trainer.refusal is None
    assert_equals_alone(study, data64, trainer)


class Slopes(nn.Module):
    """Draws in a way that lanes cannot have for themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = nn.Linear(12, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(F.rrelu(self.inside(x), training=self.training))
        return output


def test_what_draws_otherwise_trains_lane_by_lane_as_plain_torch_draws(
    make_study: MakeStudy, data64: hydro.Data
) -> None:
    study = make_study(build=lambda width: Slopes().double(), optimizer="sgd")
    before = torch.random.get_rng_state()
    trainer = trained(study, data64, "general")
    assert torch.equal(before, torch.random.get_rng_state()), "the process's own generator is left as it was"
    assert trainer.refusal is not None
    assert_equals_alone(study, data64, trainer)


class Pair(nn.Module):
    """Gives back more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Any:
        return self.inside(x), None


def test_an_output_may_have_parts_that_are_no_tensors(make_study: MakeStudy, data: hydro.Data) -> None:
    study = make_study(build=lambda width: Pair(), loss=lambda output, target: F.cross_entropy(output[0], target))
    trainer = trained(study, data, "general")
    assert trainer.refusal is None
    assert sorted(trainer.evaluate([0, 1, 2])) == [0, 1, 2]


def test_inputs_may_have_names(make_study: MakeStudy, data64: hydro.Data) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Bilinear(6, 6, 5)

        def forward(self, *, left: Tensor, right: Tensor) -> Tensor:
            output: Tensor = self.inside(left, right)
            return output

    def split(pair: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        return {"left": pair[0][:, :6], "right": pair[0][:, 6:]}, pair[1]

    named = hydro.Data(train=split(data64.train), valid=split(data64.valid))
    study = make_study(build=lambda width: Named().double(), optimizer="sgd")
    trainer = trained(study, named, "general")
    assert trainer.refusal is None
    assert sorted(trainer.evaluate([0, 1, 2])) == [0, 1, 2]


@pytest.mark.parametrize(
    "space",
    [
        {"lr": hydro.Float(1e-4, 1e-1), "batch_size": hydro.Int(5, 100, log=True)},
        {
            "lr": hydro.Float(1e-4, 1e-1),
            "momentum": hydro.Categorical([0.0, 0.9]),
            "nesterov": hydro.Categorical([True, False]),
        },
    ],
)
def test_a_space_whose_middle_is_impossible_is_measured_elsewhere(
    make_study: MakeStudy, data: hydro.Data, space: dict[str, Any]
) -> None:
    study = make_study(space=space, optimizer="sgd")
    surrogate = make_surrogate(study.build, 1, "sgd")
    profile = Profiler(
        lambda: FusedTrainer(study, surrogate, data, 10, lambda site: None), Limits(max_lanes=1, budget_s=0)
    ).run()
    assert profile.points[0].lanes == 1
