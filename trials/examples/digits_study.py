"""Handwritten digits (scikit-learn's, 8 x 8 pixels): the best Adam settings of a network with three hidden layers.

Trials train a network of width 32; the best three configurations are verified on the target of width 128.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import hydro_trials as hydro

TARGET_WIDTH = 128


def build(width: float) -> nn.Module:
    hidden = round(TARGET_WIDTH * width)
    return nn.Sequential(
        nn.Linear(64, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )


def data() -> hydro.Data:
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16 - 0.5
    y = torch.tensor(digits.target, dtype=torch.long)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    num_valid = len(x) // 5
    return hydro.Data(train=(x[num_valid:], y[num_valid:]), valid=(x[:num_valid], y[:num_valid]))


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(dim=-1) == target).float().mean()


study = hydro.Study(
    name="digits",
    build=build,
    data=data,
    loss=nn.functional.cross_entropy,
    metrics={"accuracy": accuracy},
    objective="valid.loss",
    direction="minimize",
    optimizer="adam",
    space={
        "lr": hydro.Float(1e-4, 1e-1, log=True),
        "beta1": hydro.Float(0.5, 0.99),
        "weight_decay": hydro.Float(1e-6, 1e-1, log=True),
    },
    schedule="cosine",
    batch_size=64,
    steps=1600,
    rungs=3,
    trials=112,
    max_lanes=8,
    width_scale=4,
    top_k=3,
    seed=1,
)
