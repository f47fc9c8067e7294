"""The models and data of `transfer.py`: small, real, and on every machine."""

from __future__ import annotations

import pydoc_data.topics

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import hydro_trials as hydro

TEXT_LENGTH = 32


class Block(nn.Module):
    """A Transformer block."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.rise, self.fall = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        num_samples, length, size = x.shape
        qkv = self.qkv(self.norm1(x)).view(num_samples, length, 3, self.heads, size // self.heads)
        q, k, v = (each.squeeze(2).transpose(1, 2) for each in qkv.split(1, dim=2))
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        scores = (q @ k.transpose(-2, -1)) * (size // self.heads) ** -0.5
        h = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
        x = x + self.out(h.transpose(1, 2).reshape(num_samples, length, size))
        return x + self.fall(F.gelu(self.rise(self.norm2(x))))


class Transformer(nn.Module):
    """Two layers over characters."""

    def __init__(self, size: int, heads: int, num_symbols: int) -> None:
        super().__init__()
        self.symbols, self.positions = nn.Embedding(num_symbols, size), nn.Embedding(TEXT_LENGTH, size)
        self.blocks = nn.Sequential(Block(size, heads), Block(size, heads))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, num_symbols)

    def forward(self, index: Tensor) -> Tensor:
        x = self.symbols(index) + self.positions(torch.arange(index.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def text_data() -> tuple[hydro.Data, int]:
    """Characters of Python's own documentation, and how many symbols they have."""
    text = "".join(pydoc_data.topics.topics.values())[:300_000]
    symbols = sorted(set(text))
    index = torch.tensor([symbols.index(symbol) for symbol in text])
    windows = index[: len(index) // (TEXT_LENGTH + 1) * (TEXT_LENGTH + 1)].view(-1, TEXT_LENGTH + 1)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    train, valid = windows[128:], windows[:128]
    data = hydro.Data(train=(train[:, :-1], train[:, 1:]), valid=(valid[:, :-1], valid[:, 1:]))
    return data, len(symbols)


def digits_data(*, images: bool = False) -> hydro.Data:
    """scikit-learn's handwritten digits, 8 x 8 pixels."""
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16 - 0.5
    y = torch.tensor(digits.target, dtype=torch.long)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = (x.view(-1, 1, 8, 8) if images else x)[order], y[order]
    return hydro.Data(train=(x[400:], y[400:]), valid=(x[:400], y[:400]))


def mlp(size: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(),
        nn.Linear(size, 10),
    )  # fmt: skip


def cnn(size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, size, 3, padding=1), nn.ReLU(), nn.Conv2d(size, size, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(size, size, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * size, 10),
    )  # fmt: skip


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())
