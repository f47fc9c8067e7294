"""Factors equal those of the reference package `mup` (Adam's L2 left out, where the two differ on purpose)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hydro_trials.surrogate import make_surrogate

mup: Any = pytest.importorskip("mup", reason="pip install --no-deps mup (it asks for torchvision, which it needs not)")

WIDE, NARROW = (256, 512), (32, 128)
"""Two hidden sizes that shrink by 8 and by 4: the ratios of fan-in and fan-out differ."""


class Net(nn.Module):
    def __init__(self, sizes: tuple[int, int], readout: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        first, second = sizes
        self.table = nn.Embedding(9, first)
        self.norm = nn.LayerNorm(first)
        self.middle = nn.Linear(first, second)
        self.head = readout(second, 5)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.middle(self.norm(self.table(index))).relu())


def reference() -> nn.Module:
    """The narrow net with shapes relative to the wide one."""
    base, model = Net(WIDE, mup.MuReadout), Net(NARROW, mup.MuReadout)
    mup.set_base_shapes(model, base, delta=Net((64, 64), mup.MuReadout))
    return model


def build(width: float) -> nn.Module:
    return Net(WIDE if width == 1 else NARROW)


def factors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Learning rate and decay of each parameter, by name; both are 1 where nothing is scaled."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_learning_rates_and_decay_are_those_of_mup(optimizer: str) -> None:
    model = reference()
    make = {"sgd": mup.MuSGD, "adam": mup.MuAdam, "adamw": mup.MuAdamW}[optimizer]
    expected = factors(make(model.parameters(), lr=1.0, weight_decay=1.0), model)
    rules = make_surrogate(build, 8, optimizer).rules
    assert expected.keys() == rules.keys()
    for name, (lr, decay) in expected.items():
        assert rules[name].lr == pytest.approx(lr), name
        if optimizer != "adam":
            assert rules[name].weight_decay == pytest.approx(decay), name


def test_the_readout_s_multiplier_is_that_of_mup() -> None:
    model = reference()
    assert make_surrogate(build, 8, "sgd").classification.readout_factors == {
        "head": pytest.approx(1 / model.get_submodule("head").width_mult())
    }


def test_hidden_init_is_that_of_mup() -> None:
    model = reference()
    weight = model.get_parameter("middle.weight")
    mup.init.normal_(weight, std=0.02)

    def constant(width: float) -> nn.Module:
        net = build(width)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.02)
        return net

    ours = make_surrogate(constant, 8, "sgd").make(0).get_parameter("middle.weight")
    assert float(ours.detach().std()) == pytest.approx(float(weight.detach().std()), rel=0.05)
