"""What parity is shown for, one line per entry. To cover another layer, optimizer or schedule, add a line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, NUM_CLASSES = 11, 5


@dataclass(frozen=True)
class Entry:
    """One model with an input, or one way of training it."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (12,)
    """Of one sample; words (whole numbers) where `words` is true."""
    words: bool = False
    per_word: bool = False
    """Whether every word is classified, instead of every sample."""
    vanishing: tuple[str, ...] = ()
    """Parameters whose exact gradient is zero: sign-like updates of them are rounding noise; outputs are compared."""
    bound: float = 1e-9
    """In float64, relative to a tensor's largest value."""
    single_bound: float = 1e-4
    """The same in float32, after 20 steps of plain SGD: a thousand roundings of 2 ** -24, which the steps of such small
    nets do not amplify much more. (Adam and its like divide by the size of a gradient and amplify without a bound.)"""
    fast: bool = True
    """Whether batched kernels must be able to run it."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Of the study."""
    lanes: tuple[dict[str, Any], ...] = ({"lr": 1e-2}, {"lr": 3e-3}, {"lr": 2e-3}, {"lr": 5e-3})


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, NUM_CLASSES))


def image_net(*layers: nn.Module, bias: bool = True) -> Callable[[], nn.Module]:
    """Layers between a convolution and a classifier; built anew each time from their own settings."""
    import copy

    def build() -> nn.Module:
        body = [copy.deepcopy(layer) for layer in layers]
        for layer in body:
            for part in layer.modules():
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=bias),
            *body,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, NUM_CLASSES),
        )

    return build


class Residual(nn.Module):
    """A basic block, twice the same convolution, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.twice = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.outside = nn.BatchNorm2d(4), nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.inside(x))
        y = y + F.relu(self.norm(self.twice(y)))
        y = torch.cat([y, self.twice(y)], dim=1)
        output: Tensor = self.outside(y.mean(dim=(2, 3)))
        return output


class Words(nn.Module):
    """An embedding with a padding row, some layers, and a head, which may be tied to the embedding."""

    def __init__(self, body: nn.Module, *, tied: bool = False, padding_idx: int | None = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8, padding_idx=padding_idx)
        self.body = body
        self.head = nn.Linear(8, VOCABULARY, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        output: Tensor = self.head(self.body(self.embedding(words)))
        return output


class Attention(nn.Module):
    """Causal self-attention, as a small GPT writes it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        size, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).split(8, dim=2)
        q, k, v = q.view(size, length, 2, 4), k.view(size, length, 2, 4), v.view(size, length, 2, 4)
        dropout_p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, dropout_p=dropout_p
        )
        output: Tensor = x + self.out(y.transpose(1, 2).reshape(size, length, width))
        return output


class Recurrent(nn.Module):
    """A cell, called once per word."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        self.cell = getattr(nn, cell)(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        outputs = []
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, dim=1)


class Across(nn.Module):
    """Applies a layer over the words, as channels last to channels first and back."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layers(x.transpose(1, 2)).transpose(1, 2)
        return output


class Noise(nn.Module):
    """Adds noise while training."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


def encoder(dropout: float) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True, norm_first=dropout > 0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def words(make_body: Callable[[], nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: Words(make_body(), **options)


def gpt2() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, use_cache=False))


def llama() -> nn.Module:
    """With grouped queries."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, use_cache=False))


WORDS: dict[str, Any] = {"shape": (6,), "words": True, "per_word": True}
IMAGE: dict[str, Any] = {"shape": (2, 6, 6)}

LAYERS = [
    Entry("linear", mlp),
    Entry(
        "activations",
        lambda: nn.Sequential(nn.Linear(12, 9), nn.SiLU(), nn.Linear(9, 9), nn.PReLU(), nn.Mish(), nn.Linear(9, 5)),
    ),
    Entry("conv2d", image_net(nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, bias=False)), **IMAGE),
    Entry("conv2d grouped", image_net(nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1, groups=4)), **IMAGE),
    Entry("conv2d dilated", image_net(nn.Conv2d(4, 4, 3, dilation=2, padding="same"), nn.Hardswish()), **IMAGE),
    Entry("conv2d transposed", image_net(nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, stride=2)), **IMAGE),
    Entry("conv1d", words(lambda: Across(nn.Conv1d(8, 8, 3, padding=1), nn.ReLU()), padding_idx=None), **WORDS),
    Entry("conv1d transposed", words(lambda: Across(nn.ConvTranspose1d(8, 8, 3, padding=1), nn.ELU())), **WORDS),
    Entry(
        "conv3d",
        lambda: nn.Sequential(nn.Conv3d(1, 3, 2), nn.ReLU(), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(3, 5)),
        shape=(1, 3, 3, 3),
    ),
    Entry(
        "conv3d transposed",
        lambda: nn.Sequential(nn.ConvTranspose3d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 5)),
        shape=(1, 2, 2, 2),
        fast=False,
    ),
    Entry("pooling", image_net(nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.AvgPool2d(2)), **IMAGE),
    Entry(
        "batch norm 2d",
        image_net(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        vanishing=("0.bias", "running_mean"),
        **IMAGE,
    ),
    Entry(
        "batch norm 1d",
        lambda: nn.Sequential(
            nn.Linear(12, 8, bias=False), nn.BatchNorm1d(8, momentum=0.3), nn.ReLU(), nn.Linear(8, 5)
        ),
    ),
    Entry(
        "batch norm without affine",
        image_net(nn.BatchNorm2d(4, affine=False), nn.ReLU(), bias=False),
        **IMAGE,
    ),
    Entry("layer norm", lambda: nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5))),
    Entry("group norm", image_net(nn.GroupNorm(2, 4), nn.ReLU()), **IMAGE),
    Entry(
        "instance norm",
        image_net(nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        vanishing=("0.bias",),
        fast=False,
        **IMAGE,
    ),
    Entry("rms norm", lambda: nn.Sequential(nn.Linear(12, 8), nn.RMSNorm(8), nn.ReLU(), nn.Linear(8, 5))),
    Entry("residual", Residual, vanishing=("twice.bias",), **IMAGE),
    Entry("embedding with padding", words(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU())), **WORDS),
    Entry("embedding tied to the head", words(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()), tied=True), **WORDS),
    Entry("attention", words(Attention), **WORDS),
    Entry("attention with dropout", words(lambda: Attention(0.3)), fast=False, **WORDS),
    Entry(
        "nn.TransformerEncoder", words(lambda: encoder(0.0)), vanishing=("self_attn.in_proj_bias",), fast=False, **WORDS
    ),
    Entry(
        "nn.TransformerEncoder with dropout",
        words(lambda: encoder(0.2)),
        vanishing=("self_attn.in_proj_bias",),
        fast=False,
        **WORDS,
    ),
    Entry("rnn cell", words(lambda: Recurrent("RNNCell")), fast=False, **WORDS),
    Entry("gru cell", words(lambda: Recurrent("GRUCell")), fast=False, **WORDS),
    Entry("lstm cell", words(lambda: Recurrent("LSTMCell")), fast=False, **WORDS),
    Entry(
        "dropout",
        lambda: nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.4), nn.ReLU(), nn.Linear(16, 5), nn.Dropout(0.1)),
    ),
    Entry("dropout of channels", image_net(nn.Dropout2d(0.4), nn.Conv2d(4, 4, 3)), **IMAGE),
    Entry(
        "alpha dropout",
        lambda: nn.Sequential(nn.Linear(12, 16), nn.SELU(), nn.AlphaDropout(0.2), nn.Linear(16, 5)),
        fast=False,
    ),
    Entry("noise", lambda: nn.Sequential(nn.Linear(12, 16), Noise(), nn.ReLU(), nn.Linear(16, 5)), fast=False),
    Entry("Hugging Face GPT-2 with dropout", gpt2, fast=False, **WORDS),
    Entry("Hugging Face Llama", llama, fast=False, **WORDS),
]


def with_lanes(name: str, *lanes: dict[str, Any], **fields: Any) -> Entry:
    return Entry(name, mlp, fields=fields, lanes=lanes)


def on_schedule(schedule: str, *lanes: dict[str, Any]) -> Entry:
    return Entry(schedule, mlp, fields={"schedule": schedule, "optimizer": "sgd"}, lanes=lanes)


OPTIMIZERS = [
    with_lanes("sgd", {"lr": 0.1}, {"lr": 0.02}, {"lr": 0.05}, {"lr": 0.2}, optimizer="sgd"),
    with_lanes(
        "sgd with everything",
        {"lr": 0.05, "momentum": 0.9, "nesterov": 1, "weight_decay": 1e-2},
        {"lr": 0.05, "momentum": 0.5, "dampening": 0.3, "weight_decay": 1e-3},
        {"lr": 0.1},
        {"lr": 0.02, "momentum": 0.99},
        optimizer="sgd",
    ),
    with_lanes(
        "adam",
        {"lr": 1e-2},
        {"lr": 1e-3, "beta1": 0.5, "beta2": 0.9, "weight_decay": 0.1, "eps": 1e-3},
        {"lr": 3e-3, "amsgrad": 1},
        {"lr": 2e-3},
        optimizer="adam",
    ),
    with_lanes(
        "adamw",
        {"lr": 1e-2, "weight_decay": 0.3},
        {"lr": 1e-3, "weight_decay": 0.0, "eps": 1e-2},
        {"lr": 3e-3, "amsgrad": 1},
        {"lr": 2e-3, "beta1": 0.8},
        optimizer="adamw",
    ),
    with_lanes(
        "rmsprop",
        {"lr": 1e-3},
        {"lr": 1e-3, "alpha": 0.9, "momentum": 0.5},
        {"lr": 2e-3, "centered": 1, "weight_decay": 0.01},
        {"lr": 5e-4, "eps": 1e-3},
        optimizer="rmsprop",
    ),
    with_lanes(
        "adagrad",
        {"lr": 1e-2},
        {"lr": 3e-2, "lr_decay": 0.01},
        {"lr": 1e-2, "weight_decay": 0.01},
        {"lr": 1e-2, "initial_accumulator_value": 0.1},
        optimizer="adagrad",
    ),
    with_lanes(
        "lion",
        {"lr": 1e-3},
        {"lr": 3e-4, "weight_decay": 0.1},
        {"lr": 1e-3, "beta1": 0.95},
        {"lr": 5e-4, "beta2": 0.98},
        optimizer="lion",
    ),
    with_lanes(
        "clipping",
        {"lr": 0.1, "clip_norm": 0.1},
        {"lr": 0.1, "clip_value": 0.01},
        {"lr": 0.1},
        {"lr": 0.1, "clip_norm": 1.0, "clip_value": 0.1},
        optimizer="sgd",
    ),
    with_lanes("accumulation", {"lr": 1e-2}, {"lr": 3e-3}, {"lr": 2e-3}, {"lr": 5e-3}, accumulate=3),
    with_lanes("orders of their own", {"lr": 1e-2}, {"lr": 3e-3}, {"lr": 2e-3}, {"lr": 5e-3}, data_order="per_trial"),
    with_lanes(
        "batch sizes of their own",
        {"lr": 1e-2, "batch_size": 4},
        {"lr": 3e-3, "batch_size": 16},
        {"lr": 2e-3, "batch_size": 7},
        {"lr": 5e-3, "batch_size": 16},
    ),
]

SCHEDULES = [
    on_schedule("constant", {"lr": 0.1}, {"lr": 0.05, "warmup_steps": 10}, {"lr": 0.02}, {"lr": 0.1}),
    on_schedule(
        "step",
        {"lr": 0.1, "gamma": 0.5},
        {"lr": 0.1, "gamma": 0.1, "decay_steps": 13},
        {"lr": 0.05},
        {"lr": 0.1, "warmup_steps": 5},
    ),
    on_schedule(
        "multistep",
        {"lr": 0.1, "gamma": 0.5, "milestone_1": 7},
        {"lr": 0.1, "milestone_1": 20, "milestone_2": 33},
        {"lr": 0.05},
        {"lr": 0.1, "warmup_steps": 5, "milestone_1": 9},
    ),
    on_schedule(
        "exponential",
        {"lr": 0.1, "gamma": 0.99},
        {"lr": 0.1, "gamma": 0.9},
        {"lr": 0.05, "gamma": 0.5, "decay_steps": 20},
        {"lr": 0.1, "gamma": 0.95, "warmup_steps": 5},
    ),
    on_schedule(
        "cosine", {"lr": 0.1}, {"lr": 0.1, "final_fraction": 0.2}, {"lr": 0.05, "warmup_steps": 9}, {"lr": 0.02}
    ),
    on_schedule(
        "onecycle",
        {"lr": 0.1},
        {"lr": 0.2, "pct_start": 0.5},
        {"lr": 0.05, "div_factor": 5.0},
        {"lr": 0.02, "final_div_factor": 10.0},
    ),
    on_schedule(
        "polynomial",
        {"lr": 0.1},
        {"lr": 0.1, "power": 2.0},
        {"lr": 0.05, "warmup_steps": 9},
        {"lr": 0.02, "power": 0.5},
    ),
]
