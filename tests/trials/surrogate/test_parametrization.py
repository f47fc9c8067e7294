"""Surrogates: the table of rules, what cannot be shrunk, and that width does not matter to training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hydro_trials as hydro
from hydro_slurm.errors import SurrogateError
from hydro_trials.fusion import FusedTrainer
from hydro_trials.hyperparameters import resolve_hyperparameters
from hydro_trials.surrogate import ParamRule, Surrogate, make_surrogate
from hydro_trials.surrogate.coordinate_check import check_coordinates

MakeStudy = Callable[..., hydro.Study]


class TwoInputs(nn.Module):
    """A second input that enters late, an embedding, norms, and log_softmax behind the head."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first = nn.Linear(12, size)
        self.token = nn.Parameter(torch.randn(1, 1, size))
        self.table = nn.Embedding(7, size)
        self.norm = nn.LayerNorm(size)
        self.hidden = nn.Linear(size, size)
        self.head = nn.Linear(size, 5)
        self.late = nn.Linear(12, size)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu() + self.token[0, 0] + self.table.weight[0]
        h = self.norm(self.hidden(h) + self.late(x.flip(-1)))
        return nn.functional.log_softmax(self.head(h) * self.temperature, dim=-1)


EXPECTED_KINDS = {
    "first.weight": "input",
    "first.bias": "input",
    "token": "input",
    "table.weight": "input",
    "norm.weight": "input",
    "norm.bias": "input",
    "hidden.weight": "hidden",
    "hidden.bias": "input",
    "head.weight": "output",
    "head.bias": "fixed",
    "late.weight": "input",
    "late.bias": "input",
    "temperature": "fixed",
}


def build_two_inputs(width: float) -> nn.Module:
    return TwoInputs(round(64 * width))


def build_mlp(width: float, hidden: int = 256) -> nn.Module:
    size = round(hidden * width)
    return nn.Sequential(
        nn.Linear(12, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size), nn.Linear(size, 5)
    )


def test_kinds_come_from_names_and_shapes_not_from_positions() -> None:
    surrogate = make_surrogate(build_two_inputs, 4, "adam")
    assert surrogate.classification.kinds == EXPECTED_KINDS
    assert surrogate.classification.readouts == ("head",)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (
            "sgd",
            {
                "first.weight": ParamRule("input", lr=1 / 4, weight_decay=4, eps=4),
                "norm.weight": ParamRule("input", lr=1 / 4, weight_decay=4, eps=4),
                "hidden.weight": ParamRule("hidden", init_std=2, eps=4),
                "head.weight": ParamRule("output", lr=1 / 4, weight_decay=4, eps=4),
                "head.bias": ParamRule("fixed"),
            },
        ),
        (
            "adam",
            {
                "first.weight": ParamRule("input", weight_decay=4, eps=4),
                "hidden.weight": ParamRule("hidden", init_std=2, lr=4, eps=4),
                "head.weight": ParamRule("output", weight_decay=4, eps=4),
                "head.bias": ParamRule("fixed"),
            },
        ),
        (
            "adamw",
            {
                "first.weight": ParamRule("input", eps=4),
                "hidden.weight": ParamRule("hidden", init_std=2, lr=4, weight_decay=1 / 4, eps=4),
                "head.weight": ParamRule("output", eps=4),
                "head.bias": ParamRule("fixed"),
            },
        ),
    ],
)
def test_rules_follow_the_table(optimizer: str, expected: dict[str, ParamRule]) -> None:
    rules = make_surrogate(build_two_inputs, 4, optimizer).rules
    assert {name: rules[name] for name in expected} == expected


def test_width_scale_1_is_the_target_itself() -> None:
    surrogate = make_surrogate(build_two_inputs, 1, "adam")
    assert set(surrogate.rules.values()) == {ParamRule("fixed")}
    made = surrogate.make(3)
    torch.manual_seed(3)
    native = build_two_inputs(1.0)
    assert all(torch.equal(p, q) for p, q in zip(made.parameters(), native.parameters(), strict=True))
    x = torch.randn(4, 12)
    assert torch.equal(made(x), native(x))


def test_init_std_is_the_measured_one_of_the_target() -> None:
    def build(width: float) -> nn.Module:
        """Initialised like many language models: a constant std of 0.02, whatever the width."""
        model = build_mlp(width)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02) if parameter.dim() == 2 else nn.init.zeros_(parameter)
        return model

    module = make_surrogate(build, 4, "adam").make(0)
    stds = {name: float(p.detach().std()) for name, p in module.named_parameters() if p.dim() == 2}
    assert stds["2.weight"] == pytest.approx(0.04, rel=0.05)
    assert stds["0.weight"] == pytest.approx(0.02, rel=0.1)
    assert stds["5.weight"] == pytest.approx(0.02, rel=0.15)
    assert float(dict(module.named_parameters())["2.bias"].detach().abs().max()) == 0


def test_constant_and_shifted_inits_stay_the_target_s() -> None:
    class Shifted(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.inside = nn.Linear(12, size)
            self.gain = nn.Parameter(1 + 0.1 * torch.randn(size))
            self.offset = nn.Parameter(torch.full((size,), 0.5))

        def forward(self, x: Tensor) -> Tensor:
            return self.inside(x) * self.gain + self.offset

    module = make_surrogate(lambda width: Shifted(round(512 * width)), 4, "sgd").make(0)
    values = dict(module.named_parameters())
    assert float(values["gain"].detach().mean()) == pytest.approx(1.0, abs=0.05)
    assert float(values["gain"].detach().std()) == pytest.approx(0.1, rel=0.25)
    assert torch.equal(values["offset"], torch.full((128,), 0.5))


def test_a_readout_s_input_is_multiplied_once() -> None:
    surrogate = make_surrogate(build_two_inputs, 4, "adam")
    module = surrogate.make(0)
    seen: list[Tensor] = []
    module.get_submodule("head").register_forward_hook(lambda m, args, output: seen.extend([args[0], output]))
    before: list[Tensor] = []
    module.get_submodule("norm").register_forward_hook(lambda m, args, output: before.append(output))
    module(torch.randn(3, 12))
    assert torch.equal(seen[0], before[0] * 4)


class Narrowing(nn.Module):
    def __init__(self, width: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(round(4 * width)))


class UnknownWeight(nn.Module):
    def __init__(self, width: float) -> None:
        super().__init__()
        self.mixer = nn.Parameter(torch.randn(12, round(64 * width)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.mixer


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda width: nn.Linear(12, round(16 / width)), "weight: dimension 0 is 16 at width 1 and 64 at width 1/4"),
        (lambda width: nn.Linear(12, int(3 * width)), "weight: dimension 0 is 3 at width 1 and 0 at width 1/4"),
        (Narrowing, "layers.1.weight exists at width 1 and not at width 1/4"),
        (UnknownWeight, "parameter mixer of shape"),
        (lambda width: nn.Linear(12, 8), "does not use its argument"),
        (lambda width: nn.Embedding(round(8 * width), round(8 * width)), "number of embeddings follows width"),
        (lambda width: 1 / 0, "ZeroDivisionError"),
        (lambda width: "model", "returned str"),
    ],
)
def test_what_cannot_be_shrunk_is_refused_by_name(build: Callable[[float], nn.Module], complaint: str) -> None:
    with pytest.raises(SurrogateError, match=complaint):
        make_surrogate(build, 4, "adam")


def test_a_kind_that_shapes_cannot_tell_may_be_given() -> None:
    surrogate = make_surrogate(UnknownWeight, 4, "sgd", parameter_kinds={"mixer": "input"})
    assert surrogate.rules["mixer"].lr == 1 / 4
    with pytest.raises(SurrogateError, match="must belong to a module with one input"):
        make_surrogate(UnknownWeight, 4, "sgd", parameter_kinds={"mixer": "output"})
    with pytest.raises(SurrogateError, match="mixxer"):
        make_surrogate(UnknownWeight, 4, "sgd", parameter_kinds={"mixxer": "input"})


class Tied(nn.Module):
    def __init__(self, width: float, *, call_head: bool) -> None:
        super().__init__()
        size = round(64 * width)
        self.table = nn.Linear(12, size, bias=False)
        self.embedding = nn.Embedding(5, size)
        self.head = nn.Linear(size, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.call_head = call_head

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        return self.head(h) if self.call_head else nn.functional.linear(h, self.embedding.weight)


def test_a_tied_readout_must_be_called_as_a_module(make_study: MakeStudy, data: hydro.Data) -> None:
    values = {"lr": 1e-3}
    for call_head in (True, False):
        study = make_study(build=lambda width, call=call_head: Tied(width, call_head=call), width_scale=4)
        surrogate = make_surrogate(study.build, 4, "adam")
        assert surrogate.classification.readouts == ("head",)
        trainer = FusedTrainer(study, surrogate, data, 10, lambda site: None)
        trainer.admit(0, 0, resolve_hyperparameters("adam", "constant", {}, values))
        if call_head:
            trainer.step()
        else:
            with pytest.raises(SurrogateError, match="head is a readout"):
                trainer.step()


def hidden_changes(study: hydro.Study, data: hydro.Data, tamper: Callable[[Surrogate], Surrogate]) -> list[float]:
    """Mean absolute change of the second hidden layer's output after one step, for S = 1, 2, 4, 8, 16."""
    scales = (1, 2, 4, 8, 16)
    check = check_coordinates(
        study,
        data,
        {"lr": 0.05},
        scales,
        num_steps=1,
        shrink=lambda scale: tamper(make_surrogate(study.build, scale, "sgd")),
    )
    return check.changes["2"][0]


def test_the_hidden_sgd_learning_rate_is_unchanged_under_s(make_study: MakeStudy, data: hydro.Data) -> None:
    study = make_study(build=lambda width: build_mlp(width, 512), optimizer="sgd")
    flat = hidden_changes(study, data, lambda surrogate: surrogate)
    assert max(flat) < 1.5 * min(flat)

    def times_s(surrogate: Surrogate) -> Surrogate:
        rules = {
            name: dataclasses.replace(rule, lr=surrogate.width_scale) if rule.kind == "hidden" else rule
            for name, rule in surrogate.rules.items()
        }
        return dataclasses.replace(surrogate, rules=rules)

    growing = hidden_changes(study, data, times_s)
    assert growing[-1] > 4 * growing[0]


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.05), ("adam", 2e-3), ("adamw", 2e-3)])
def test_coordinates_do_not_depend_on_width(make_study: MakeStudy, data: hydro.Data, optimizer: str, lr: float) -> None:
    study = make_study(build=build_mlp, optimizer=optimizer)
    assert check_coordinates(study, data, {"lr": lr}, (1, 2, 4, 8)).problems == []


def test_the_coordinate_check_catches_standard_parametrization(make_study: MakeStudy, data: hydro.Data) -> None:
    study = make_study(build=build_mlp, optimizer="adam")

    def native(scale: float) -> Surrogate:
        """The narrow model with no rule applied."""
        return make_surrogate(lambda width: build_mlp(1 / scale), 1, "adam")

    check = check_coordinates(study, data, {"lr": 2e-3}, (1, 2, 4, 8), shrink=native)
    assert check.problems
    with pytest.raises(SurrogateError, match="at least three"):
        check_coordinates(study, data, {"lr": 2e-3}, (1, 2))


@pytest.mark.parametrize("num_lanes", [1, 3])
def test_factors_apply_whatever_the_lanes_learning_rates_are(
    make_study: MakeStudy, data: hydro.Data, num_lanes: int
) -> None:
    """With all learning rates alike, and with a single lane, Adam's first step is lr times the factor everywhere."""
    study = make_study(optimizer="adam", width_scale=4, fixed={"eps": 0.0})
    surrogate = make_surrogate(study.build, 4, "adam")
    trainer = FusedTrainer(study, surrogate, data, 10, lambda site: None)
    for trial in range(num_lanes):
        trainer.admit(trial, trial, resolve_hyperparameters("adam", "constant", study.fixed, {"lr": 1e-3}))
    before = trainer.state(0).parameters
    trainer.step()
    after = trainer.state(0).parameters
    for name, factor in (("0.weight", 1), ("2.weight", 4), ("4.weight", 1)):
        moved = (after[name] - before[name]).abs()
        assert float(moved[moved > 1e-5].median()) == pytest.approx(1e-3 * factor, rel=1e-2)


def decay_shares(
    study: hydro.Study, data: hydro.Data, tamper: Callable[[Surrogate], Surrogate]
) -> dict[str, list[float]]:
    """By how much L2 decay has shrunk each weight after 20 steps, relative to a run without, for S = 1, 4, 16."""
    num_seeds = 6
    shares: dict[str, list[float]] = {}
    for scale in (1, 4, 16):
        runs = []
        for decay in (0.0, 1e-3):
            trainer = FusedTrainer(
                study, tamper(make_surrogate(build_mlp, scale, "adam")), data, 200, lambda site: None
            )
            params = {"lr": 1e-3, "weight_decay": decay}
            for seed in range(num_seeds):
                trainer.admit(seed, seed, resolve_hyperparameters("adam", "constant", {}, params))
            for _ in range(20):
                trainer.step()
            runs.append([trainer.state(seed).parameters for seed in range(num_seeds)])
        for name in ("0.weight", "2.weight"):
            lost = [
                float(((a[name] - b[name]) * a[name]).sum() / a[name].square().sum())
                for a, b in zip(*runs, strict=True)
            ]
            shares.setdefault(name, []).append(sum(lost) / num_seeds)
    return shares


def test_adam_s_decay_shrinks_alike_at_every_width(make_study: MakeStudy, data: hydro.Data) -> None:
    """Adam divides its L2 term by the gradient's size: the coefficient of input weights must grow with S."""
    space = {"lr": hydro.Float(1e-4, 1e-1), "weight_decay": hydro.Float(0, 1)}
    study = make_study(build=build_mlp, optimizer="adam", space=space, data_order="per_trial")
    shares = decay_shares(study, data, lambda surrogate: surrogate)
    assert max(shares["0.weight"]) < 1.3 * min(shares["0.weight"])
    assert max(shares["2.weight"]) < 2 * min(shares["2.weight"])

    def unscaled(surrogate: Surrogate) -> Surrogate:
        rules = {name: dataclasses.replace(rule, weight_decay=1.0) for name, rule in surrogate.rules.items()}
        return dataclasses.replace(surrogate, rules=rules)

    shares = decay_shares(study, data, unscaled)
    assert max(shares["0.weight"]) > 4 * min(shares["0.weight"])


def test_transposed_convolutions_may_be_readouts_and_depthwise() -> None:
    def build(width: float) -> nn.Module:
        size = round(32 * width)
        return nn.Sequential(
            nn.Conv2d(3, size, 3),
            nn.ConvTranspose2d(size, size, 3, groups=size),
            nn.ConvTranspose2d(size, size, 3),
            nn.ConvTranspose2d(size, 3, 3),
        )

    surrogate = make_surrogate(build, 4, "sgd")
    kinds = surrogate.classification.kinds
    assert [kinds[f"{index}.weight"] for index in range(4)] == ["input", "input", "hidden", "output"]
    assert surrogate.classification.readout_factors == {"3": 4.0}
    assert surrogate.make(0)(torch.zeros(2, 3, 8, 8)).shape == (2, 3, 12, 12)
