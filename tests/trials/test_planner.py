"""The planner: what it measures, what it chooses, and the limits that it keeps to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import hydro_trials as hydro
from hydro_slurm import formats
from hydro_slurm.errors import FusionError, PlannerError
from hydro_slurm.model import Profile, ProfilePoint
from hydro_trials.fusion import FusedTrainer
from hydro_trials.fusion.program import FAST, GENERAL, SEPARATE
from hydro_trials.planner import Limits, Profiler, choose_point, knee, profile_key
from hydro_trials.planner.memory import peak_bytes, reset_peak
from hydro_trials.surrogate import make_surrogate

MakeStudy = Callable[..., hydro.Study]
CPU = torch.device("cpu")


def point(lanes: int, rate: float, kind: str = GENERAL) -> ProfilePoint:
    return ProfilePoint(lanes, kind, None, 1.0, rate, 100.0, lanes << 20)


def make(study: hydro.Study, data: hydro.Data) -> Callable[[], FusedTrainer]:
    surrogate = make_surrogate(study.build, 1, study.optimizer)
    return lambda: FusedTrainer(study, surrogate, data, study.steps, lambda site: None)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [({1: 10, 2: 19, 4: 30, 8: 31}, 4), ({1: 10}, 1), ({1: 10, 2: 9.6}, 1), ({1: 1, 2: 2, 4: 4}, 4), ({}, 0)],
)
def test_the_knee_is_the_smallest_count_with_95_percent_of_the_best(rates: dict[int, float], expected: int) -> None:
    assert knee([point(lanes, rate) for lanes, rate in rates.items()]) == expected


@given(st.lists(st.integers(1, 500), min_size=1, max_size=6, unique=True), st.integers(1, 600))
def test_the_point_nearest_to_a_count_is_chosen(counts: list[int], wanted: int) -> None:
    points = [point(lanes, 1.0) for lanes in counts]
    chosen = choose_point(points, wanted)
    assert chosen is not None
    ratio = max(chosen.lanes / wanted, wanted / chosen.lanes)
    assert all(ratio <= max(lanes / wanted, wanted / lanes) * (1 + 1e-12) for lanes in counts)


def test_a_profile_holds_every_way_at_every_count_and_picks_the_fastest(
    make_study: MakeStudy, data: hydro.Data
) -> None:
    profile = Profiler(make(make_study(), data), Limits(max_lanes=6)).run()
    counts = [p.lanes for p in profile.points]
    assert counts == [1, 2, 4, 6][: len(counts)]
    for best in profile.points:
        rivals = [p for p in profile.others if p.lanes == best.lanes]
        assert all(best.step_ms <= rival.step_ms for rival in rivals)
        assert best.lane_steps_per_s == pytest.approx(best.lanes / best.step_ms * 1e3, rel=1e-2)
    first = {p.kind for p in [*profile.points, *profile.others] if p.lanes == 1}
    assert {GENERAL, SEPARATE} <= first
    assert FAST in first or FAST in profile.refused
    assert profile.knee_lanes in counts
    assert profile.base_bytes > 1 << 20


def test_a_profile_file_says_what_was_measured(make_study: MakeStudy, data: hydro.Data, tmp_path: Path) -> None:
    profile = Profiler(make(make_study(), data), Limits(max_lanes=2)).run()
    formats.write_record(tmp_path / "p.json", profile)
    assert formats.read_record(Profile, tmp_path / "p.json") == profile
    assert json.loads((tmp_path / "p.json").read_text())["format"] == "hydro.profile"


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"seed": 5}, True),
        ({"trials": 5}, True),
        ({"optimizer": "sgd"}, False),
        ({"batch_size": 8}, False),
        ({"precision": "bf16"}, False),
        ({"build": lambda width: nn.Sequential(nn.Linear(12, 5))}, False),
    ],
)
def test_the_key_changes_with_what_changes_the_figures(
    make_study: MakeStudy, data: hydro.Data, fields: dict[str, Any], same: bool
) -> None:
    keys = [profile_key(make(make_study(**each), data)()) for each in ({}, fields)]
    assert (keys[0] == keys[1]) == same


def test_running_out_of_memory_ends_the_rise_and_keeps_what_was_measured(
    make_study: MakeStudy, data: hydro.Data
) -> None:
    study = make_study()
    surrogate = make_surrogate(study.build, 1, study.optimizer)

    class Short(FusedTrainer):
        def step(self) -> None:
            if len(self.lanes) > 4:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
            super().step()

    profiler = Profiler(lambda: Short(study, surrogate, data, 40, lambda site: None), Limits(max_lanes=32))
    profile = profiler.run([1, 2, 4, 8, 16])
    assert [p.lanes for p in profile.points] == [1, 2, 4]
    assert profile.stopped == "out of memory with 8 lanes"
    halved = Profiler(lambda: Short(study, surrogate, data, 40, lambda site: None), Limits(max_lanes=32)).run([16])
    assert [p.lanes for p in halved.points] == [4]


def test_a_cap_in_bytes_is_kept_to(make_study: MakeStudy, data: hydro.Data) -> None:
    """By the process's own peak: a cap between the peaks of two counts lets the smaller pass alone."""
    study = make_study(build=lambda width: nn.Sequential(nn.Linear(12, 600), nn.ReLU(), nn.Linear(600, 200)))
    free = Profiler(make(study, data), Limits()).run([1, 32])
    assert [p.lanes for p in free.points] == [1, 32]
    small, large = (p.peak_bytes for p in free.points)
    assert large - small > 31 * 600 * 200 * 4 * 3, "weights and both moments of 31 lanes"
    capped = Profiler(make(study, data), Limits(cap_bytes=(small + large) // 2)).run([1, 32])
    assert [p.lanes for p in capped.points] == [1]
    assert "32 lanes take" in capped.stopped
    with pytest.raises(PlannerError, match="not even one lane fits"):
        Profiler(make(study, data), Limits(cap_bytes=1 << 20)).run([1])


def test_memory_is_the_process_s_own_peak_since_the_reset() -> None:
    reset_peak(CPU)
    before = peak_bytes(CPU)
    block = torch.ones(64 << 18)
    during = peak_bytes(CPU)
    del block
    assert during - before > 60 << 20
    assert peak_bytes(CPU) > during - (4 << 20), "a peak does not fall"
    reset_peak(CPU)
    assert peak_bytes(CPU) < during - (50 << 20)


class Slow(nn.Module):
    """Computes for a given time."""

    def __init__(self, ms: float) -> None:
        super().__init__()
        self.ms = ms
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        import time

        until = time.thread_time() + self.ms / 1e3
        while x.shape[0] and time.thread_time() < until:  # looks at the shape, so that no trace leaves the loop out
            pass
        return x * self.scale


def slow_net(*ms: float) -> nn.Module:
    return nn.Sequential(nn.Linear(12, 12), nn.Sequential(*(Slow(each) for each in ms)), nn.Linear(12, 5))


def test_a_step_is_cut_at_module_boundaries_until_its_quanta_fit(make_study: MakeStudy, data: hydro.Data) -> None:
    study = make_study(build=lambda width: slow_net(60, 60, 60))
    loose = Profiler(make(study, data), Limits(quantum_ms=2000)).run([1])
    assert loose.points[0].depth == 0, "the whole step fits"
    tight = Profiler(make(study, data), Limits(quantum_ms=130)).run([1])
    assert tight.points[0].depth is None or tight.points[0].depth > 1
    assert 60e3 < tight.points[0].quantum_p99_us <= 130e3


def test_an_operation_longer_than_the_quantum_is_refused(make_study: MakeStudy, data: hydro.Data) -> None:
    study = make_study(build=lambda width: slow_net(60))
    with pytest.raises(PlannerError, match=r"an operation takes \d+\.\d+ ms, the quantum is 20 ms"):
        Profiler(make(study, data), Limits(quantum_ms=20)).run([1])


def test_a_way_that_gives_other_numbers_is_not_used(
    make_study: MakeStudy, data: hydro.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(self: FusedTrainer, kind: str) -> None:
        raise FusionError(f"the {kind} path differs")

    monkeypatch.setattr(FusedTrainer, "compare", compare)
    profile = Profiler(make(make_study(), data), Limits(max_lanes=1)).run()
    assert profile.refused == {FAST: "the fast path differs"}
    assert {p.kind for p in [*profile.points, *profile.others]} == {GENERAL, SEPARATE}


def test_a_model_that_cannot_be_fused_is_planned_lane_by_lane(make_study: MakeStudy, data: hydro.Data) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        value = nn.functional.cross_entropy(output, target)
        return value if value > 0 else -value

    profile = Profiler(make(make_study(loss=loss), data), Limits(max_lanes=2)).run()
    assert {p.kind for p in profile.points} == {SEPARATE}
    assert "torch.Tensor.__bool__ in the loss" in profile.refused[GENERAL]


def test_measuring_leaves_no_lanes_and_no_gate_behind(make_study: MakeStudy, data: hydro.Data) -> None:
    trainers: list[FusedTrainer] = []
    make_one = make(make_study(), data)

    def keep() -> FusedTrainer:
        trainers.append(make_one())
        return trainers[-1]

    Profiler(keep, replace(Limits(), max_lanes=2)).run()
    assert [trainer.lanes for trainer in trainers] == [[]] * len(trainers)
