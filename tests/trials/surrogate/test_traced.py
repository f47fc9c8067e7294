"""Module instances: which sizes follow width is learned from one run; what cannot follow is refused by name."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_nets import GPT, VOCABULARY, Encoder, ResNet18, mobilenet_v3, study_of, vgg11
from torch import Tensor, nn

import hydro_trials as hydro
from hydro_slurm.errors import SurrogateError
from hydro_trials.fusion import FusedTrainer
from hydro_trials.runtime.sample_lanes import fill_trainer
from hydro_trials.surrogate import Surrogate, make_surrogate
from hydro_trials.surrogate.scale import choose_scale

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.zeros(2, 8, dtype=torch.long)
SAMPLES = torch.randn(16, 12, generator=torch.Generator().manual_seed(2)), torch.arange(16) % 5
VECTORS = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))


def shapes(surrogate: Surrogate) -> dict[str, tuple[int, ...]]:
    return {name: shape.surrogate_shape for name, shape in surrogate.classification.parameters.items()}


class Joined(nn.Module):
    """Several inputs that enter late, concatenation, two heads, something behind them, and a residual."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, size), nn.Linear(4, size)
        self.norm = nn.LayerNorm(size)
        self.joined = nn.Linear(2 * size, size)
        self.late = nn.Linear(size + 12, size)
        self.head, self.other = nn.Linear(size, 5), nn.Linear(size, 2)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.norm(self.first(x[:, :8])), self.second(x[:, 8:]).relu()
        h = a + self.joined(torch.cat([a, b], dim=-1)).relu()
        h = self.late(torch.cat([h, x], dim=-1)).relu()
        return torch.cat([F.log_softmax(self.head(h) * self.temperature, -1), self.other(h)], dim=-1)


class Grouped(nn.Module):
    """Depthwise and grouped convolutions, a channel shuffle, and a flattened map of computed size."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, size, 3, padding=1)
        self.depthwise = nn.Conv2d(size, 2 * size, 3, padding=1, groups=size)
        self.grouped = nn.Conv2d(2 * size, 2 * size, 3, padding=1, groups=16)
        self.groups = 2
        self.hidden, self.head = nn.Linear(2 * size * 16, size), nn.Linear(size, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.depthwise(self.stem(x).relu())
        n, c, height, width = h.shape
        h = h.view(n, self.groups, c // self.groups, height, width).transpose(1, 2).reshape(n, c, height, width)
        h = F.max_pool2d(self.grouped(h).relu(), 2)
        return self.head(self.hidden(h.view(n, -1)).relu())


def test_only_inside_sizes_shrink() -> None:
    surrogate = make_surrogate(Joined(), 4, "adam", example=VECTORS)
    found = shapes(surrogate)
    assert found["first.weight"] == (8, 8)
    assert found["joined.weight"] == (8, 16)
    assert found["late.weight"] == (8, 20), "8 of 32 activations, and all 12 inputs"
    assert (found["head.weight"], found["other.weight"]) == ((5, 8), (2, 8))
    assert surrogate.make(0)(VECTORS).shape == (2, 7)
    late = surrogate.classification.parameters["late.weight"]
    assert (late.fan_in_ratio, late.fan_out_ratio) == (44 / 20, 4)


def test_input_and_output_layers_are_not_found_by_position() -> None:
    """A second input, and log_softmax behind the head, once had the wrong layers rescaled (bug 4 of the original)."""
    surrogate = make_surrogate(Joined(), 4, "sgd", example=VECTORS)
    assert surrogate.classification.readouts == ("head", "other")
    kinds = surrogate.classification.kinds
    assert kinds["first.weight"] == kinds["second.weight"] == "input"
    assert kinds["temperature"] == kinds["head.bias"] == "fixed"


def test_depthwise_and_grouped_convolutions_keep_their_fan_in() -> None:
    surrogate = make_surrogate(Grouped(), 4, "sgd", example=IMAGES)
    found = shapes(surrogate)
    assert (found["depthwise.weight"], found["grouped.weight"]) == ((16, 1, 3, 3), (16, 4, 3, 3))
    assert found["hidden.weight"] == (8, 256)
    module = surrogate.make(0)
    assert module.get_submodule("grouped").groups == 4
    assert module.get_submodule("depthwise").groups == 8
    kinds = surrogate.classification.kinds
    assert kinds["depthwise.weight"] == kinds["grouped.weight"] == "input", "their fan-in does not follow width"


def test_heads_shrink_and_keep_their_size() -> None:
    module = make_surrogate(GPT(64, 8), 4, "adam", example=TOKENS).make(0)
    attention = module.get_submodule("blocks.0.attention")
    assert (attention.n_head, attention.size) == (2, 16)
    encoder = make_surrogate(Encoder(1, 64, 8), 4, "adam", example=IMAGES).make(0)
    self_attention = encoder.get_submodule("encoder.layers.0.self_attn")
    assert (self_attention.num_heads, self_attention.head_dim, self_attention.embed_dim) == (2, 8, 16)


def test_tied_weights_stay_tied() -> None:
    surrogate = make_surrogate(GPT(64, 8, tied=True), 4, "adam", example=TOKENS)
    module = surrogate.make(0)
    assert module.get_submodule("head").weight is module.get_submodule("tokens").weight
    assert surrogate.classification.readouts == ("head",)
    assert module(TOKENS).shape == (2, 8, VOCABULARY)


@pytest.mark.parametrize("build", [ResNet18, vgg11, mobilenet_v3])
def test_well_known_nets_shrink(build: type[nn.Module]) -> None:
    surrogate = make_surrogate(build(), 8, "sgd", example=IMAGES)
    parameters = surrogate.classification.parameters.values()
    target, narrow = (
        sum(torch.Size(shape).numel() for shape in sizes)
        for sizes in ([p.target_shape for p in parameters], [p.surrogate_shape for p in parameters])
    )
    assert target / narrow > 30
    assert surrogate.make(0)(IMAGES).shape == (2, 5)


def test_modules_that_are_not_rebuilt_from_their_repr() -> None:
    """LayerNorm, BatchNorm1d, AvgPool2d, Flatten, biased convolutions, TransformerEncoder (bug 5 of the original)."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=True),
        nn.AvgPool2d(2),
        nn.GroupNorm(2, 16),
        nn.PReLU(16),
        nn.Flatten(2),
        nn.LayerNorm(16),
        nn.Flatten(),
        nn.Linear(256, 16),
        nn.BatchNorm1d(16),
        nn.Linear(16, 5),
    )
    assert make_surrogate(net, 4, "sgd", example=IMAGES).make(0)(IMAGES).shape == (2, 5)
    encoder = make_surrogate(Encoder(), 8, "sgd", example=IMAGES)
    assert encoder.make(0)(IMAGES).shape == (2, 5)


def test_weights_are_drawn_anew_from_the_given_distribution() -> None:
    """A table with `padding_idx` keeps its row of zeros, and no other (bug 6 of the original)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(30, 64, padding_idx=3), nn.Flatten(), nn.Linear(512, 5))
    nn.init.constant_(net[2].bias, 0.25)  # type: ignore[arg-type]
    before = copy.deepcopy(net.state_dict())
    surrogate = make_surrogate(net, 4, "sgd", example=TOKENS)
    table = surrogate.make(1).get_parameter("0.weight")
    assert [row for row in range(30) if not table[row].any()] == [3]
    assert float(table.detach()[4:].std()) == pytest.approx(1.0, rel=0.1)
    assert torch.equal(surrogate.make(1).get_parameter("0.weight"), table)
    assert not torch.equal(surrogate.make(2).get_parameter("0.weight"), table)
    assert bool((surrogate.make(1).get_parameter("2.bias") == 0.25).all())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_at_width_scale_1_a_module_keeps_its_own_weights() -> None:
    net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5))
    surrogate = make_surrogate(net, 1, "sgd", example=VECTORS)
    for seed in (0, 1):
        module = surrogate.make(seed)
        assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in module.state_dict().items())
        assert all(parameter is not own for parameter, own in zip(module.parameters(), net.parameters(), strict=True))
    redrawn = make_surrogate(net, 1, "sgd", example=VECTORS, redraw=True)
    assert not torch.equal(redrawn.make(0).get_parameter("0.weight"), redrawn.make(1).get_parameter("0.weight"))


class Literal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(12, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).view(-1, 64))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(4, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x.view(-1, 3, 4))[0][:, -1])


class Decides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("not on these inputs")


@pytest.mark.parametrize(
    ("net", "scale", "complaint"),
    [
        (Literal(), 4, r"cannot be shrunk by 4: its forward holds sizes of its own .*\[-1, 64\]"),
        (Recurrent(), 4, r"no size of this Recurrent can follow width \(operation .* in module cell"),
        (nn.Linear(12, 5), 4, "every size is an input's or an output's"),
        (Decides(), 4, "cannot be traced: .*not on these inputs"),
        (
            nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 5)),
            5,
            "does not divide dimension 0 of 0.weight.*that does is 4",
        ),
        (nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 5)), 2.5, "by whole numbers, got width_scale 2.5"),
    ],
)
def test_what_cannot_be_shrunk_is_refused_by_name(net: nn.Module, scale: float, complaint: str) -> None:
    with pytest.raises(SurrogateError, match=complaint):
        make_surrogate(net, scale, "sgd", example=VECTORS)


class Spectral(nn.Module):
    """Half of it is a transform that the trace does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.fft.fft(self.first(x)).real).relu())


def test_operations_that_keep_sizes_from_shrinking_are_named() -> None:
    surrogate = make_surrogate(Spectral(), 4, "sgd", example=VECTORS)
    assert shapes(surrogate)["second.weight"] == (8, 32), "what comes from the transform keeps its size"
    (note,) = surrogate.notes
    assert "operation view_as_real in module the model is not known to the trace" in note
    assert make_surrogate(Joined(), 4, "sgd", example=VECTORS).notes == ()


@pytest.mark.parametrize("build", [Recurrent(), Literal(), nn.Linear(12, 5), lambda width: nn.Linear(12, 5)])
def test_what_cannot_be_shrunk_works_as_its_own_target(build: Any) -> None:
    study = study_of(build, "sgd", data=lambda: hydro.Data(train=SAMPLES, valid=SAMPLES), batch_size=8, max_lanes=2)
    surrogate = choose_scale(study, study.data(), gate=True).surrogate
    trainer = FusedTrainer(study, surrogate, study.data(), 2, lambda site: None)
    fill_trainer(trainer, 2)
    trainer.step()
    assert all(math.isfinite(result["valid.loss"]) for result in trainer.evaluate(trainer.trials).values())


def test_a_scale_that_does_not_divide_the_heads_says_so() -> None:
    with pytest.raises(SurrogateError, match="does not divide the heads or groups of module blocks"):
        make_surrogate(GPT(64, 4), 8, "adam", example=TOKENS)
