"""What the fusion benchmark makes of its measurements."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from fusion_results import AGAIN, PLAIN, PROCESSES, Cell, Point, Series, choose, claims_of, memory_claim, table
from fusion_ways import in_child

MIB = 2**20


def make_cell(lanes: int, *, separate: float, general: float, fast: float | None = None) -> Cell:
    speeds = {PLAIN: 10.0, "separate": separate, AGAIN: separate * 1.01, PROCESSES: 20.0, "general": general}
    peaks = {"separate": MIB, "general": 3 * MIB}
    if fast is not None:
        speeds["fast"], peaks["fast"] = fast, 2 * MIB
    return Cell(lanes, {way: [speed] * 6 for way, speed in speeds.items()}, peaks)


def claimed(series: Series) -> dict[str, float]:
    return {claim.name: claim.value for claim in claims_of(series, "cpu")}


def test_the_knee_is_the_smallest_f_that_is_fast_enough() -> None:
    points = [Point("general", 1, 10.0, 1), Point("general", 8, 96.0, 1), Point("general", 16, 100.0, 1)]
    assert choose([*points, Point("separate", 8, 12.0, 1)]) == points[1]


def test_the_faster_way_is_chosen_at_the_knee() -> None:
    series = Series(
        "mlp", 8, 2, [make_cell(1, separate=10, general=5, fast=6), make_cell(8, separate=10, general=20, fast=30)]
    )
    claims = claimed(series)
    assert claims["cpu.planner.mlp.s8.ratio"] == pytest.approx(3)
    assert claims["cpu.planner.mlp.s8.over_plain"] == pytest.approx(3)
    assert claims["cpu.planner.mlp.s8.over_processes"] == pytest.approx(3)
    assert claims["cpu.mlp.s8.f1.ratio"] == pytest.approx(0.6)
    assert claims["cpu.mlp.s8.general_over_fast"] == pytest.approx(2 / 3)


def test_falling_back_is_measured_against_a_series_of_its_own() -> None:
    series = Series("gpt", 8, 2, [make_cell(1, separate=10, general=5), make_cell(2, separate=10, general=9)])
    assert claimed(series)["cpu.planner.gpt.s8.ratio"] == pytest.approx(1 / 1.01)
    assert "planner: falls back to separate steps" in table(series).splitlines()[0]


def test_rounds_that_choose_do_not_judge() -> None:
    cell = make_cell(1, separate=10, general=5)
    cell.rates["general"] = [30.0, 5.0] * 3
    assert claimed(Series("gpt", 8, 2, [cell]))["cpu.planner.gpt.s8.ratio"] == pytest.approx(0.5)


def test_a_slower_moment_does_not_decide_between_lanes() -> None:
    slowed = make_cell(8, separate=10, general=30)
    slowed.rates = {way: [rate / 4 for rate in rates] for way, rates in slowed.rates.items()}
    cell, kind = Series("mlp", 8, 2, [make_cell(1, separate=10, general=5), slowed]).choice()
    assert (cell.lanes, kind) == (8, "general")


def test_memory_is_claimed_where_both_paths_were_measured() -> None:
    without = Series("mlp", 8, 2, [make_cell(1, separate=10, general=5)])
    assert memory_claim(without) is None
    both = memory_claim(Series("mlp", 8, 2, [make_cell(1, separate=10, general=5, fast=6)]))
    assert both is not None and (both.name, both.value) == ("memory.mlp.general_over_fast", 1.5)


def test_a_failing_child_says_why() -> None:
    assert in_child(lambda: 7) == 7
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        in_child(lambda: 1 / 0)
