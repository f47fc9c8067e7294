"""The benchmarks' models: as published at width 1, trainable and shrinkable below it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from hydro_trials.surrogate import make_surrogate

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from nets import Gpt, Mlp, MobileNetV3, ResNet18, Vgg11, WideResNet50
from zoo import MLP, ZOO, Size

PUBLISHED = {
    # torchvision's counts for 1000 classes; those of common implementations for CIFAR-10; for the others by their sizes
    "resnet18": (lambda: ResNet18(num_classes=10), 11_173_962),
    "vgg11": (lambda: Vgg11(num_classes=10), 9_231_114),
    "mobilenetv3": (lambda: MobileNetV3(num_classes=1000), 5_483_032),
    "wrn50": (lambda: WideResNet50(num_classes=1000), 68_883_240),
    "gpt": (Gpt, 4 * (12 * 512**2 + 13 * 512) + (2 * 256 + 128) * 512 + 2 * 512),
    "mlp": (Mlp, 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10),
}
EXACT_SCALES = {name: (8,) if name == "mobilenetv3" else (8, 16) for name in ZOO}


@pytest.mark.parametrize("name", ZOO)
def test_has_the_published_number_of_parameters(name: str) -> None:
    build, published = PUBLISHED[name]
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in build().parameters()) == published


@pytest.mark.parametrize("name", ZOO)
def test_trains_at_an_eighth_of_its_width(name: str) -> None:
    entry = ZOO[name]
    model = entry.build(1 / 8)
    x, y = entry.make_data(Size(entry.on_cpu.sample, 2, 16)).train
    loss = entry.loss(model(x[:2]), y[:2])
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ZOO)
def test_every_hidden_width_follows_the_scale(name: str) -> None:
    for scale in EXACT_SCALES[name]:
        with torch.device("meta"):
            target, narrow = ZOO[name].build(1.0), ZOO[name].build(1 / scale)
        for wide, thin in zip(target.parameters(), narrow.parameters(), strict=True):
            ratios = {a / b for a, b in zip(wide.shape, thin.shape, strict=True)}
            assert ratios <= {1.0, float(scale)}


@pytest.mark.parametrize("name", ZOO)
def test_can_be_traced(name: str) -> None:
    graph = fx.symbolic_trace(ZOO[name].build(1 / 8)).graph
    assert any(node.op == "call_module" for node in graph.nodes)


@pytest.mark.parametrize("name", [name for name in ZOO if name != "wrn50"])  # its target alone takes seconds to draw
def test_has_a_surrogate(name: str) -> None:
    surrogate = make_surrogate(ZOO[name].build, 8, ZOO[name].optimizer)
    assert len(surrogate.classification.readouts) == 1
    assert isinstance(surrogate.make(0), nn.Module)


def test_synthetic_samples_are_the_same_every_time() -> None:
    first, second = MLP.data("cpu"), MLP.data("cpu")
    assert torch.equal(first.train[0], second.train[0])
    assert len(first.train[0]) + len(first.valid[0]) == MLP.on_cpu.num_samples


def test_text_follows_itself() -> None:
    tokens, targets = ZOO["gpt"].data("cpu").train
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert bytes(tokens[0].tolist()).isascii()
