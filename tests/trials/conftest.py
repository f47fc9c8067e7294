"""Small studies that train in milliseconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hydro_trials as hydro

sys.path.insert(0, str(Path(__file__).parent))

NUM_INPUTS, NUM_CLASSES = 12, 5


def build_mlp(width: float, *, hidden: int = 32) -> nn.Module:
    size = round(hidden * width)
    return nn.Sequential(
        nn.Linear(NUM_INPUTS, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, NUM_CLASSES)
    )


def make_data(dtype: torch.dtype = torch.float32, num_samples: int = 200) -> hydro.Data:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(num_samples, NUM_INPUTS, generator=generator, dtype=dtype)
    y = (x @ torch.randn(NUM_INPUTS, NUM_CLASSES, generator=generator, dtype=dtype)).argmax(dim=1)
    return hydro.Data(train=(x[:160], y[:160]), valid=(x[160:], y[160:]))


@pytest.fixture
def make_study() -> Callable[..., hydro.Study]:
    """A study of a small network; keyword arguments replace its fields."""

    def make(**fields: Any) -> hydro.Study:
        defaults: dict[str, Any] = {
            "name": "small",
            "build": build_mlp,
            "data": make_data,
            "loss": nn.functional.cross_entropy,
            "space": {"lr": hydro.Float(1e-4, 1.0, log=True)},
            "optimizer": "adam",
            "batch_size": 16,
            "steps": 40,
        }
        return hydro.Study(**{**defaults, **fields})

    return make


@pytest.fixture
def data() -> hydro.Data:
    return make_data()


@pytest.fixture
def data64() -> hydro.Data:
    return make_data(torch.float64)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
