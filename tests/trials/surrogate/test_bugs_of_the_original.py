"""Each error of the original system that touches surrogates, as a test named after it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_nets import study_of
from torch import Tensor, nn

from hydro_trials.fusion import FusedTrainer
from hydro_trials.hyperparameters import resolve_hyperparameters
from hydro_trials.surrogate import make_surrogate, study_surrogate
from hydro_trials.surrogate.coordinate_check import check_coordinates


def mlp(width: float) -> nn.Module:
    size = round(512 * width)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 5)
    )


def test_bug_1_the_hidden_sgd_learning_rate_is_not_multiplied_by_s() -> None:
    study = study_of(mlp, "sgd")
    data = study.data()
    changes = {
        rule: check_coordinates(
            study,
            data,
            {"lr": 0.01},
            (1, 2, 4, 8, 16),
            num_steps=1,
            shrink=lambda scale, rule=rule: make_surrogate(mlp, scale, "sgd", sgd_rule=rule),  # type: ignore[misc]
        ).changes["3"][0]
        for rule in ("mup", "times_s")
    }
    assert max(changes["mup"]) < 1.5 * min(changes["mup"])
    assert changes["times_s"][-1] > 8 * changes["times_s"][0]


@pytest.mark.parametrize("learning_rates", [[1e-3], [1e-3, 1e-3, 1e-3], [1e-3, 5e-3]])
def test_bug_3_factors_hold_whatever_the_lanes_learning_rates_are(learning_rates: list[float]) -> None:
    """One lane, lanes that agree, lanes that differ: Adam's first step is lr times the factor everywhere."""
    study = study_of(mlp, "adam", fixed={"eps": 0.0})
    trainer = FusedTrainer(study, study_surrogate(study, 8, study.data()), study.data(), 10, lambda site: None)
    for trial, lr in enumerate(learning_rates):
        trainer.admit(trial, trial, resolve_hyperparameters("adam", "constant", study.fixed, {"lr": lr}))
    before = [trainer.state(trial).parameters for trial in trainer.trials]
    trainer.step()
    for trial, lr in enumerate(learning_rates):
        after = trainer.state(trial).parameters
        for name, factor in (("1.weight", 1), ("3.weight", 8), ("5.weight", 1)):
            moved = (after[name] - before[trial][name]).abs()
            assert float(moved[moved > lr / 100].median()) == pytest.approx(lr * factor, rel=1e-2)


class LateInput(nn.Module):
    """A second input behind the hidden layer, and log_softmax behind the head."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.late, self.head = nn.Linear(4, size), nn.Linear(size, 5)
        self.first, self.hidden = nn.Linear(8, size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(self.first(x[:, :8]).relu()) + self.late(x[:, 8:])
        return F.log_softmax(self.head(h.relu()), dim=-1)


def test_bug_4_layers_are_not_told_by_their_position() -> None:
    for build, example in ((lambda width: LateInput(round(64 * width)), None), (LateInput(64), torch.randn(2, 12))):
        surrogate = make_surrogate(build, 8, "sgd", example=example)
        kinds = surrogate.classification.kinds
        assert (kinds["late.weight"], kinds["first.weight"]) == ("input", "input")
        assert (kinds["hidden.weight"], kinds["head.weight"]) == ("hidden", "output")
        assert surrogate.classification.readouts == ("head",)


class Renamed(nn.Linear):
    """Says nothing useful about itself."""

    def extra_repr(self) -> str:
        return "not to be parsed"


def test_bug_5_modules_are_not_rebuilt_by_parsing_their_repr() -> None:
    vectors = nn.Sequential(Renamed(12, 32), nn.BatchNorm1d(32), nn.LayerNorm(32), nn.Linear(32, 5))
    images = nn.Sequential(nn.Conv2d(3, 16, 3, bias=True), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(144, 5))
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    sequences = nn.Sequential(nn.Linear(6, 32), encoder, nn.Flatten(), nn.Linear(96, 5))
    for net, shape in ((vectors, (2, 12)), (images, (2, 3, 8, 8)), (sequences, (2, 3, 6))):
        example = torch.randn(shape)
        surrogate = make_surrogate(net, 4, "sgd", example=example)
        assert surrogate.make(0)(example).shape == (2, 5)


def test_bug_6_padding_rows_and_tied_heads_learn_as_they_should() -> None:
    class Tied(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.table = nn.Embedding(24, size, padding_idx=2)
            self.hidden = nn.Linear(size, size)
            self.head = nn.Linear(size, 24, bias=False)
            self.head.weight = self.table.weight

        def forward(self, index: Tensor) -> Tensor:
            return self.head(self.hidden(self.table(index)).relu())

    study = study_of(lambda width: Tied(round(64 * width)), "sgd", tokens=True)
    trainer = FusedTrainer(study, study_surrogate(study, 4, study.data()), study.data(), 10, lambda site: None)
    for trial in range(3):
        trainer.admit(trial, trial, resolve_hyperparameters("sgd", "constant", {}, {"lr": 0.1}))
        table = trainer.state(trial).parameters["table.weight"]
        assert [row for row in range(24) if not table[row].any()] == [2], "the padding row, not the trial's number"
    before = trainer.state(1).parameters["table.weight"]
    trainer.step()
    assert bool((trainer.state(1).parameters["table.weight"] != before).any(dim=1).all()), "every class gets a gradient"
