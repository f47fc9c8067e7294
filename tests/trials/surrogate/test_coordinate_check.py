"""The coordinate check: passes what is right, at up to S = 16, and names the module of every planted error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_nets import GPT, Encoder, ResNet18, mlp, mobilenet_v3, study_of, vgg11, wide_resnet50
from torch import Tensor, nn

import hydro_trials as hydro
from hydro_slurm.errors import SurrogateError
from hydro_trials.surrogate import Surrogate, study_surrogate
from hydro_trials.surrogate.coordinate_check import CoordinateCheck, check_coordinates
from hydro_trials.surrogate.scale import calm_params, check_scale, check_widths

Tamper = Callable[[Surrogate], Surrogate]
slow = pytest.mark.slow


def gpt(width: float) -> nn.Module:
    return GPT(round(256 * width), max(1, round(16 * width)))


RIGHT: list[Any] = [
    pytest.param(mlp, 16, False, id="mlp"),
    pytest.param(mlp(), 16, False, id="mlp-traced"),
    pytest.param(Encoder(), 8, False, id="transformer-encoder-traced"),
    pytest.param(gpt, 16, True, id="gpt"),
    pytest.param(GPT(128, 8, tied=True), 8, True, id="gpt-tied-traced"),
    pytest.param(vgg11(base=16), 4, False, id="vgg11-traced"),
    pytest.param(mobilenet_v3(base=16), 2, False, id="mobilenetv3-s2-traced", marks=slow),
    pytest.param(lambda width: mobilenet_v3(width, 64), 8, False, id="mobilenetv3", marks=slow),
    pytest.param(mobilenet_v3(), 8, False, id="mobilenetv3-traced", marks=slow),
    pytest.param(wide_resnet50(base=32), 8, False, id="wideresnet50-traced", marks=slow),
    pytest.param(lambda width: wide_resnet50(width, 64), 16, False, id="wideresnet50", marks=slow),
    pytest.param(ResNet18(base=32), 8, False, id="resnet18-traced", marks=slow),
    pytest.param(lambda width: ResNet18(width, 64), 16, False, id="resnet18", marks=slow),
    pytest.param(vgg11(base=64), 16, False, id="vgg11-s16-traced", marks=slow),
    pytest.param(lambda width: Encoder(width, 256, 16), 16, False, id="transformer-encoder", marks=slow),
]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(("build", "scale", "tokens"), RIGHT)
def test_what_is_right_passes(build: Any, scale: float, tokens: bool, optimizer: str) -> None:
    study = study_of(build, optimizer, tokens=tokens)
    data = study.data()
    assert check_scale(study, data, study_surrogate(study, scale, data)).problems == []


def run(study: hydro.Study, tamper: Tamper, scales: tuple[float, ...] = (1, 4, 16)) -> CoordinateCheck:
    data = study.data()
    return check_coordinates(
        study,
        data,
        {"lr": 1e-2 if study.optimizer == "sgd" else 1e-3},
        scales,
        num_steps=2,
        shrink=lambda scale: tamper(study_surrogate(study, scale, data)),
    )


def lr_of(kind: str, power: float) -> Tamper:
    """A learning-rate factor that is off by S to some power."""

    def tamper(surrogate: Surrogate) -> Surrogate:
        rules = {
            name: dataclasses.replace(rule, lr=rule.lr * surrogate.width_scale**power) if rule.kind == kind else rule
            for name, rule in surrogate.rules.items()
        }
        return dataclasses.replace(surrogate, rules=rules)

    return tamper


def without_readout_factor(surrogate: Surrogate) -> Surrogate:
    factors = dict.fromkeys(surrogate.classification.readout_factors, 1.0)
    classification = dataclasses.replace(surrogate.classification, readout_factors=factors)
    return dataclasses.replace(surrogate, classification=classification)


def with_standard_init(surrogate: Surrogate) -> Surrogate:
    return dataclasses.replace(surrogate, init_scales={})


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("tamper", "module"),
    [
        pytest.param(lr_of("hidden", 1), "module 3", id="hidden-lr-times-s"),
        pytest.param(lr_of("hidden", -1), "module 3", id="hidden-lr-over-s"),
        pytest.param(lr_of("output", 1), "module 5", id="readout-lr-times-s"),
        pytest.param(lr_of("input", 1), "module 1", id="input-lr-times-s"),
        pytest.param(lr_of("input", -1), "module 1", id="input-lr-over-s"),
        pytest.param(without_readout_factor, "module ", id="missing-readout-multiplier"),
        pytest.param(with_standard_init, "module ", id="standard-init"),
    ],
)
def test_planted_errors_are_caught(tamper: Tamper, module: str, optimizer: str) -> None:
    problems = run(study_of(mlp, optimizer), tamper).problems
    assert problems
    assert problems[0].startswith(module)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"fixed": {"warmup_steps": 2000}}, id="warm-up"),
        pytest.param({"schedule": "exponential", "fixed": {"gamma": 1e-9, "warmup_steps": 50}}, id="decay"),
        pytest.param({"space": {"lr": hydro.Float(1e-9, 1e-8, log=True)}}, id="tiny-lr"),
        pytest.param({"space": {"warmup_steps": hydro.Int(500, 900)}, "fixed": {"lr": 1e-3}}, id="searched-warm-up"),
    ],
)
def test_planted_errors_are_caught_whatever_the_first_steps_of_the_schedule_are(fields: dict[str, Any]) -> None:
    study = study_of(mlp, "sgd", **fields)
    data = study.data()
    checked = check_coordinates(
        study,
        data,
        calm_params(study),
        (1, 4, 16),
        num_steps=2,
        num_seeds=2,
        shrink=lambda scale: lr_of("hidden", 1)(study_surrogate(study, scale, data)),
    )
    assert checked.problems[0].startswith("module 3: its change shrinks")


def test_where_nothing_is_learned_the_check_says_so() -> None:
    study = dataclasses.replace(study_of(mlp, "sgd"), loss=lambda output, target: 0 * output.sum())
    assert (
        run(study, lambda surrogate: surrogate).problems[0].startswith("hardly anything is learned in 2 steps at lr ")
    )


def test_frozen_modules_are_no_problem() -> None:
    def build(width: float) -> nn.Module:
        model = mlp(width)
        model.get_submodule("1").requires_grad_(False)
        model.get_submodule("3").requires_grad_(False)
        return model

    assert run(study_of(build, "sgd"), lambda surrogate: surrogate).problems == []


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_missing_readout_multiplier_is_found_at_the_head(optimizer: str) -> None:
    assert any(
        "module head" in text for text in run(study_of(gpt, optimizer, tokens=True), without_readout_factor).problems
    )


def test_standard_init_is_found_where_it_stands() -> None:
    """The target's constant std of 0.02 at every width: hidden outputs shrink with width from the start."""

    def build(width: float) -> nn.Module:
        model = gpt(width)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
            elif float(parameter.detach().std()) > 0:
                nn.init.zeros_(parameter)
        return model

    problems = run(study_of(build, "adam", tokens=True), with_standard_init).problems
    assert "module blocks.0.attention.qkv" in problems[0]
    assert "at the start" in problems[0]


class ScaledEmbedding(GPT):
    """Multiplies embeddings by sqrt(width), which is not a constant factor."""

    def forward(self, index: Tensor) -> Tensor:
        x = self.tokens(index) * self.tokens.embedding_dim**0.5 + self.positions
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = x + block["attention"](block["norm1"](x))
            x = x + block["mlp"](block["norm2"](x))
        return self.head(self.norm(x))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_embedding_scaled_by_the_model_is_found(optimizer: str) -> None:
    build = lambda width: ScaledEmbedding(round(256 * width), max(1, round(16 * width)))  # noqa: E731
    problems = run(study_of(build, optimizer, tokens=True), lambda surrogate: surrogate).problems
    assert "module blocks.0.norm1 (input): its size depends on width at the start" in problems[0]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_embedding_whose_lr_is_unscaled_is_found(optimizer: str) -> None:
    def tamper(surrogate: Surrogate) -> Surrogate:
        rules = dict(surrogate.rules)
        rules["tokens.weight"] = dataclasses.replace(rules["tokens.weight"], lr=surrogate.width_scale)
        return dataclasses.replace(surrogate, rules=rules)

    assert run(study_of(gpt, optimizer, tokens=True), tamper).problems[0].startswith("module tokens")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_over_sqrt_d_with_shrunken_heads_is_found(optimizer: str) -> None:
    study = study_of(lambda width: GPT(round(256 * width), 4), optimizer, tokens=True)
    problems = run(study, lambda surrogate: surrogate, (1, 2, 8)).problems
    assert "module blocks.0.attention (attention scores): the head size follows width" in problems[0]
    study = study_of(lambda width: GPT(round(256 * width), 4, scale_by=8 / (64 * width)), optimizer, tokens=True)
    assert run(study, lambda surrogate: surrogate, (1, 2, 8)).problems == []


def partly_shrunken_heads(width: float, *, scaled: bool) -> GPT:
    """Twelve heads of 8: fewer down to three, smaller after that."""
    heads = max(3, round(12 * width))
    head_size = round(96 * width) // heads
    return GPT(round(96 * width), heads, scale_by=8**0.5 / head_size if scaled else None)


def test_heads_that_shrink_only_in_the_last_factor_are_judged_over_their_size() -> None:
    scales = (1, 4, 8)
    right = study_of(lambda width: partly_shrunken_heads(width, scaled=True), "sgd", tokens=True)
    checked = run(right, lambda surrogate: surrogate, scales)
    assert "blocks.0.attention (attention scores)" in checked.shrinking_heads
    assert checked.problems == []
    wrong = study_of(lambda width: partly_shrunken_heads(width, scaled=False), "sgd", tokens=True)
    assert "divided by its square root" in run(wrong, lambda surrogate: surrogate, scales).problems[0]


def test_torch_s_attention_is_scaled_where_its_heads_shrink() -> None:
    """Multiplying what keys are made of is multiplying the scores: the keys' bias cancels in the softmax."""
    build = lambda width: nn.MultiheadAttention(round(64 * width), 4, batch_first=True)  # noqa: E731
    study = study_of(build, "adam")
    surrogate = study_surrogate(study, 4, study.data())
    assert surrogate.classification.heads[""].factor == pytest.approx(2)
    module = surrogate.make(0)
    assert isinstance(module, nn.MultiheadAttention)
    with torch.no_grad():
        module.in_proj_bias.normal_()
    plain = nn.MultiheadAttention(16, 4, batch_first=True)
    plain.load_state_dict(module.state_dict())
    with torch.no_grad():
        plain.in_proj_weight[:16] *= 2
        plain.in_proj_bias[:16] *= 2
    x = torch.randn(3, 5, 16)
    for given, expected in zip(module(x, x, x), plain(x, x, x), strict=True):
        assert torch.allclose(given, expected, atol=1e-6)


def test_a_training_that_breaks_down_is_a_problem() -> None:
    study = dataclasses.replace(study_of(mlp, "sgd"), loss=lambda output, target: output.sum() * float("nan"))
    assert "training is not finite" in run(study, lambda surrogate: surrogate).problems[0]


def test_three_widths_are_needed() -> None:
    study = study_of(nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.Linear(3, 5)), "sgd")
    data = study.data()
    surrogate = study_surrogate(study, 3, data)
    with pytest.raises(SurrogateError, match=r"takes three widths, and only S=3 and S=1 can be built"):
        check_widths(study, data, surrogate, {3.0: surrogate}, most=3)
