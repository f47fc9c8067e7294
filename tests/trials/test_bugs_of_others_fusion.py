"""What the public code of the system that this one follows gets wrong when it fuses, each as a test of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from alone import train_alone
from torch import Tensor, nn

import hydro_trials as hydro
from hydro_slurm import formats
from hydro_slurm.model import BundleSlot, BundleSpec, Device, Profile
from hydro_trials.fusion import FusedTrainer, LaneState
from hydro_trials.hyperparameters import resolve_hyperparameters
from hydro_trials.planner import Limits, Profiler
from hydro_trials.runtime.plan import LanePlan
from hydro_trials.surrogate import make_surrogate

MakeStudy = Callable[..., hydro.Study]


def make_trainer(study: hydro.Study, data: hydro.Data, scale: float = 1) -> FusedTrainer:
    surrogate = make_surrogate(study.build, scale, study.optimizer)
    return FusedTrainer(study, surrogate, data, study.steps, lambda site: None)


def admit(trainer: FusedTrainer, trial: int, params: dict[str, Any], state: LaneState | None = None) -> None:
    study = trainer.study
    values = resolve_hyperparameters(study.optimizer, study.schedule, study.fixed, params)
    trainer.admit(trial, 10 + trial, values, state)


def run(trainer: FusedTrainer, num_steps: int) -> None:
    for _ in range(num_steps):
        trainer.step()


def double_mlp(width: float) -> nn.Module:
    size = round(16 * width)
    return nn.Sequential(nn.Linear(12, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 5)).double()


def assert_equals_alone(
    trainer: FusedTrainer, trial: int, params: dict[str, Any], num_steps: int, scale: float = 1
) -> None:
    study = trainer.study
    surrogate = make_surrogate(study.build, scale, study.optimizer)
    alone = train_alone(study, surrogate, trainer.data, 10 + trial, params, num_steps)
    found = trainer.export(trial)
    for name, expected in alone.state_dict().items():
        assert float((found[name] - expected).abs().max()) <= 1e-9 * float(expected.abs().max()), name


@pytest.mark.parametrize("num_lanes", [1, 2, 8])
def test_bug_2_the_loss_is_the_mean_over_lanes(make_study: MakeStudy, data64: hydro.Data, num_lanes: int) -> None:
    """Then every lane's gradient is divided by their number: a step of plain SGD would be that much shorter."""
    study = make_study(build=double_mlp, optimizer="sgd")
    trainer = make_trainer(study, data64)
    for trial in range(num_lanes):
        admit(trainer, trial, {"lr": 0.1})
    run(trainer, 1)
    for trial in range(num_lanes):
        assert_equals_alone(trainer, trial, {"lr": 0.1}, 1)


@pytest.mark.parametrize("lrs", [[0.01], [0.01, 0.01, 0.01]])
def test_bug_3_factors_switch_off_when_all_lanes_have_one_lr(
    make_study: MakeStudy, data64: hydro.Data, lrs: list[float]
) -> None:
    study = make_study(build=double_mlp, optimizer="adam")
    trainer = make_trainer(study, data64, scale=4)
    assert {rule.lr for rule in trainer.surrogate.rules.values()} == {1.0, 4.0}
    for trial, lr in enumerate(lrs):
        admit(trainer, trial, {"lr": lr})
    run(trainer, 5)
    for trial, lr in enumerate(lrs):
        assert_equals_alone(trainer, trial, {"lr": lr}, 5, scale=4)


class Ordinary(nn.Module):
    """Every module that crashed there, on one path or another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=True)
        self.pool, self.flat, self.norm1 = nn.AvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(8)
        self.norm2, self.head = nn.LayerNorm(8), nn.Linear(8, 5)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True), 1, enable_nested_tensor=False
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.flat(self.pool(self.conv(x.view(-1, 1, 3, 4)))))
        output: Tensor = self.head(self.norm2(self.encoder(x.unsqueeze(1)).squeeze(1)))
        return output


def test_bug_5_ordinary_modules_crash(make_study: MakeStudy, data64: hydro.Data) -> None:
    """Modules are called, never rebuilt from what they print."""
    study = make_study(build=lambda width: Ordinary().double(), optimizer="sgd")
    trainer = make_trainer(study, data64)
    for trial in range(3):
        admit(trainer, trial, {"lr": 0.01})
    run(trainer, 5)
    assert trainer.refusal is None
    for trial in range(3):
        assert_equals_alone(trainer, trial, {"lr": 0.01}, 5)


class Tied(nn.Module):
    def __init__(self, padding_idx: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6, padding_idx=padding_idx)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        output: Tensor = self.head(self.embedding(words).mean(dim=1))
        return output


@pytest.mark.parametrize("kind", ["general", "fast", "separate"])
@pytest.mark.parametrize("padding_idx", [0, 1, 2])
def test_bug_6_padding_row_k_zeroes_trial_k_s_table_and_tied_heads_get_no_gradient(
    make_study: MakeStudy, padding_idx: int, kind: str
) -> None:
    def data() -> hydro.Data:
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(0, 7, (40, 4), generator=generator)
        return hydro.Data(train=(words, words[:, 0]), valid=(words, words[:, 0]))

    study = make_study(build=lambda width: Tied(padding_idx).double(), optimizer="sgd", data=data, batch_size=8)
    trainer = make_trainer(study, data())
    trainer.use(kind)
    for trial in range(3):
        admit(trainer, trial, {"lr": 0.5})
    before = {trial: trainer.export(trial)["embedding.weight"] for trial in range(3)}
    run(trainer, 5)
    for trial in range(3):
        assert_equals_alone(trainer, trial, {"lr": 0.5}, 5)
        table = trainer.export(trial)["head.weight"]
        assert table.abs().max() > 0
        assert not torch.equal(table, before[trial]), "the tied head has had no gradient"


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop", "adagrad", "lion"])
def test_bug_7_stopping_lanes_loses_state_resets_the_lr_and_ends_fusion(
    make_study: MakeStudy, data64: hydro.Data, optimizer: str
) -> None:
    fixed = {"momentum": 0.9} if optimizer in ("sgd", "rmsprop") else {}
    study = make_study(build=double_mlp, optimizer=optimizer, schedule="cosine", fixed=fixed)
    trainer = make_trainer(study, data64)
    for trial in range(4):
        admit(trainer, trial, {"lr": 1e-3 * (trial + 1)})
    run(trainer, 6)
    trainer.drop([0, 2])
    assert trainer.trials == [1, 3], "the survivors are fused still"
    run(trainer, 6)
    for trial in (1, 3):
        assert_equals_alone(trainer, trial, {"lr": 1e-3 * (trial + 1)}, 12)


def test_bug_8_the_planner_s_result_is_thrown_away(make_study: MakeStudy, data: hydro.Data, tmp_path: Any) -> None:
    """What was measured decides how lanes are run, and throughput decides how many."""
    study = make_study()
    surrogate = make_surrogate(study.build, 1, study.optimizer)

    def make() -> FusedTrainer:
        return FusedTrainer(study, surrogate, data, study.steps, lambda site: None)

    (tmp_path / "profiles").mkdir()
    spec = BundleSpec(
        bundle="b1",
        study="small",
        study_dir=str(tmp_path),
        study_file="unused.py",
        purpose="search",
        width_scale=1.0,
        max_lanes=4,
        lanes=(),
        rungs=(10,),
        slot=BundleSlot("own", "n1", Device()),
    )
    measured = Profiler(make, Limits(max_lanes=2)).run()
    for kind in ("separate", "general"):
        points = tuple(point for point in [*measured.points, *measured.others] if point.kind == kind)
        profile = Profile(**{**vars(measured), "points": points, "others": ()})
        formats.write_record(tmp_path / "profiles" / f"{measured.key}.json", profile)
        trainer = make()
        admit(trainer, 0, {"lr": 0.01})
        LanePlan.of(make, spec).apply(trainer)
        assert trainer.program.kind == kind
    best = max(point.lane_steps_per_s for point in measured.points)
    (knee,) = [point for point in measured.points if point.lanes == measured.knee_lanes]
    assert knee.lane_steps_per_s >= 0.95 * best


def test_bug_9_no_nesterov_per_lane_one_schedule_one_batch_size_no_resume(
    make_study: MakeStudy, data64: hydro.Data
) -> None:
    lanes: list[dict[str, Any]] = [
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "batch_size": 8},
        {"lr": 0.05, "momentum": 0.5, "nesterov": False, "batch_size": 16},
        {"lr": 0.05, "momentum": 0.7, "nesterov": True, "batch_size": 5},
    ]
    space = {
        "lr": hydro.Float(0.01, 0.1),
        "momentum": hydro.Float(0.1, 0.99),
        "nesterov": hydro.Categorical([False, True]),
        "batch_size": hydro.Int(4, 16),
    }
    study = make_study(build=double_mlp, optimizer="sgd", schedule="polynomial", space=space)
    first, second = make_trainer(study, data64), make_trainer(study, data64)
    for trial, params in enumerate(lanes):
        admit(first, trial, params)
    run(first, 7)
    for trial, params in enumerate(lanes):
        admit(second, trial, params, first.state(trial))
    run(second, 8)
    for trial, params in enumerate(lanes):
        assert_equals_alone(second, trial, params, 15)
