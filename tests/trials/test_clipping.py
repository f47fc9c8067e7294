"""Gradient clipping: torch.nn.utils for every lane, and nothing of one lane in another."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import nn

from hydro_trials.fusion.optimizers import LaneSettings, clip_gradients
from hydro_trials.hyperparameters import resolve_hyperparameters

CLIPS: list[dict[str, float]] = [
    {},
    {"clip_norm": 1e-3},
    {"clip_norm": 5.0},
    {"clip_norm": 1e6},
    {"clip_value": 0.5},
    {"clip_norm": 20.0, "clip_value": 0.3},
    {"clip_value": 1e9},
]


def settings_of(clips: Iterable[dict[str, float]]) -> list[LaneSettings]:
    return [LaneSettings(0, resolve_hyperparameters("sgd", "constant", {}, {"lr": 0.1, **clip})) for clip in clips]


@pytest.mark.parametrize("size", [64, 192, 4096, 9984])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), -float("inf")])
def test_clipping_is_torch_s_for_every_lane(bad: float | None, size: int) -> None:
    torch.manual_seed(0)
    grad_FP = torch.randn(len(CLIPS), size, dtype=torch.float64)
    if bad is not None:
        grad_FP[:, 5] = bad
    before_FP, num_boundaries = grad_FP.clone(), [0]
    lanes = settings_of(CLIPS)
    clip_gradients(grad_FP, lanes, boundary=lambda: num_boundaries.__setitem__(0, num_boundaries[0] + 1))
    assert num_boundaries[0] >= size // 4096
    for row, lane in enumerate(lanes):
        parameters = [part.clone().requires_grad_() for part in before_FP[row].split([16, 48, size - 64])]
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()
        if lane.values["clip_norm"]:
            nn.utils.clip_grad_norm_(parameters, lane.values["clip_norm"])
        if lane.values["clip_value"]:
            nn.utils.clip_grad_value_(parameters, lane.values["clip_value"])
        expected_P = torch.cat([p.grad for p in parameters if p.grad is not None])
        torch.testing.assert_close(grad_FP[row], expected_P, rtol=1e-12, atol=0, equal_nan=True)
    assert torch.equal(grad_FP[0].view(torch.int64), before_FP[0].view(torch.int64))


@pytest.mark.parametrize("size", [64, 4160, 20032])
def test_clipping_does_not_know_the_other_lanes(size: int) -> None:
    """In float32: alone, in another order, or beside lanes that are not finite."""
    torch.manual_seed(0)
    before_FP = torch.randn(len(CLIPS), size)
    together_FP = before_FP.clone()
    clip_gradients(together_FP, settings_of(CLIPS))
    for row, clip in enumerate(CLIPS):
        alone_FP = before_FP[row : row + 1].clone()
        clip_gradients(alone_FP, settings_of([clip]))
        assert torch.equal(alone_FP[0], together_FP[row])
        spoiled_FP = before_FP.flip(0)
        spoiled_FP[: len(CLIPS) - 1 - row] = float("nan")
        clip_gradients(spoiled_FP, settings_of(reversed(CLIPS)))
        assert torch.equal(spoiled_FP[len(CLIPS) - 1 - row], together_FP[row])


def test_a_lane_that_clips_nothing_keeps_every_bit_beside_one_that_does() -> None:
    odd_P = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 3e38, 1.0]).repeat(8)
    grad_FP = torch.stack([odd_P, torch.ones(64)])
    clip_gradients(grad_FP, settings_of([{}, {"clip_norm": 0.1, "clip_value": 0.1}]))
    assert torch.equal(grad_FP[0].view(torch.int32), odd_P.view(torch.int32))
