"""What may share a bundle is worked out from the study."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hydro_trials as hydro
from hydro_slurm.model import LaneSpec
from hydro_slurm.study.grouping import group_of, take_alike
from hydro_trials.fusion.sharing import reason_against_mixing, separating_names

MakeStudy = Callable[..., hydro.Study]

SPACE = {"lr": hydro.Float(1e-4, 1e-1), "batch_size": hydro.Categorical([8, 16])}


class Centred(nn.Module):
    """Mixes samples without being called a batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0)


class Gated(nn.Module):
    """Mixes samples through a gate that is shut at first."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * x.mean(dim=0)


class Averaging(nn.Module):
    """Keeps a running mean, and does not use it yet."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.lerp_(x.detach().mean(dim=0), 0.1)  # type: ignore[operator]
        return x


def ignoring(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target, ignore_index=2)


def weighted(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target, weight=torch.tensor([1.0, 5.0, 1.0, 1.0, 1.0]))


def summed(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target, reduction="sum")


@pytest.mark.parametrize(
    ("layer", "loss", "reason"),
    [
        (nn.LayerNorm(12), nn.functional.cross_entropy, ""),
        (nn.BatchNorm1d(12), nn.functional.cross_entropy, r"module 0 \(BatchNorm1d\) normalises over the samples"),
        (Centred(), nn.functional.cross_entropy, "depends on the others"),
        (nn.Dropout(0.5), nn.functional.cross_entropy, "draws random numbers"),
        (Averaging(), nn.functional.cross_entropy, "computes its buffer 0.mean from a whole batch"),
        (Gated(), nn.functional.cross_entropy, "depends on the others"),
        (nn.ReLU(), weighted, "not the mean of its samples"),
        (nn.ReLU(), ignoring, "not the mean of its samples"),
        (nn.ReLU(), summed, "not the mean of its samples"),
    ],
)
def test_batch_sizes_share_a_bundle_unless_something_ties_samples_together(
    make_study: MakeStudy, data: hydro.Data, layer: nn.Module, loss: Any, reason: str
) -> None:
    module = nn.Sequential(layer, nn.Linear(12, 5))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    study = make_study(loss=loss, space=SPACE)
    found = reason_against_mixing(study, module, data)
    assert bool(found) == bool(reason)
    assert not reason or re.search(reason, found)
    assert separating_names(study, module, data) == (("batch_size",) if reason else ())
    assert separating_names(make_study(loss=loss), module, data) == (), "nothing to separate by"
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())


def lane(trial: int, batch_size: int) -> LaneSpec:
    return LaneSpec(trial, {"lr": 0.1, "batch_size": batch_size}, seed=trial)


def test_a_bundle_takes_trials_of_one_group_and_leaves_the_others_in_order() -> None:
    waiting = deque([lane(0, 8), lane(1, 16), lane(2, 8), lane(3, 16), lane(4, 8)])
    taken = take_alike(waiting, 2, ("batch_size",), None)
    assert [each.trial for each in taken] == [0, 2]
    assert [each.trial for each in waiting] == [1, 3, 4]
    joined = take_alike(waiting, 5, ("batch_size",), group_of(taken[0], ("batch_size",)))
    assert [each.trial for each in joined] == [4]
    assert [each.trial for each in waiting] == [1, 3]
    assert [each.trial for each in take_alike(waiting, 5, (), None)] == [1, 3], "nothing separates them"


def test_new_trials_of_other_groups_are_kept_for_bundles_of_their_own() -> None:
    made = iter(range(100))

    def ask() -> LaneSpec | None:
        number = next(made)
        return lane(number, 8 if number % 3 == 0 else 16) if number < 7 else None

    waiting: deque[LaneSpec] = deque()
    assert [each.trial for each in take_alike(waiting, 3, ("batch_size",), None, ask)] == [0, 3]
    assert [each.trial for each in waiting] == [1, 2, 4], "no more are asked for ahead than a bundle of them"
    assert take_alike(waiting, 3, ("batch_size",), (8,), ask) == []
    assert [each.trial for each in take_alike(waiting, 4, ("batch_size",), (16,), ask)] == [1, 2, 4, 5]
    assert [each.trial for each in take_alike(waiting, 4, ("batch_size",), (8,), ask)] == [6]
