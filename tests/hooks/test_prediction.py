"""Gap durations: what is promised to a bundle, and what is not learned."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydro_slurm.hooks.prediction import GapPredictor, quantiles_ms

MS = 1_000_000


def taught(*durations_ms: float, position: int = 2, **settings: float) -> GapPredictor:
    predictor = GapPredictor(**settings)  # type: ignore[arg-type]
    for duration_ms in durations_ms:
        predictor.record(position, round(duration_ms * MS))
    return predictor


def test_nothing_is_predicted_before_enough_was_seen() -> None:
    predictor = taught(50, 50, 50, min_samples=4)
    assert predictor.predict(2) == 0
    predictor.record(2, 50 * MS)
    assert predictor.predict(2) == 50 * MS


def test_the_lower_quartile_of_the_last_dozen_is_promised() -> None:
    predictor = taught(*[500] * 20, *range(10, 22), outlier_factor=1000)
    assert predictor.predict(2) == round(12.75 * MS)
    assert taught(*range(10, 22), quantile=0.5).predict(2) == round(15.5 * MS)


def test_positions_are_learned_apart_and_unknown_ones_stay_closed() -> None:
    predictor = taught(*[40] * 6)
    assert predictor.predict(3) == 0
    for _ in range(6):
        predictor.record(3, 7 * MS)
    assert (predictor.predict(2), predictor.predict(3)) == (40 * MS, 7 * MS)
    assert predictor.num_usable == 2
    assert predictor.predicted_ns_per_iteration() == 47 * MS


def test_gaps_under_three_milliseconds_are_of_no_use() -> None:
    predictor = taught(*[2.9] * 12)
    assert predictor.predict(2) == 0
    assert predictor.num_usable == 0
    assert predictor.usable_durations_ns() == []


def test_an_evaluation_in_a_gap_is_not_learned() -> None:
    predictor = taught(*[40] * 6)
    assert not predictor.record(2, 4000 * MS)
    assert predictor.predict(2) == 40 * MS
    assert 4000 * MS not in predictor.usable_durations_ns()


def test_a_gap_that_has_become_long_for_good_is_learned_in_the_end() -> None:
    predictor = taught(*[10] * 12)
    learned = [predictor.record(2, 400 * MS) for _ in range(predictor.window + predictor.min_samples)]
    assert not any(learned[: predictor.window - 1])
    assert predictor.predict(2) == 400 * MS


def test_another_schedule_is_learned_anew_and_the_same_one_is_not() -> None:
    predictor = GapPredictor()
    assert predictor.set_schedule(("1f1b", 2, 4))
    for _ in range(6):
        predictor.record(2, 40 * MS)
    assert not predictor.set_schedule(("1f1b", 2, 4))
    assert predictor.predict(2) == 40 * MS
    assert predictor.set_schedule(("1f1b", 2, 8))
    assert predictor.predict(2) == 0


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=40), st.floats(0, 1))
def test_what_is_promised_lies_among_what_was_seen(durations: list[int], quantile: float) -> None:
    predictor = GapPredictor(quantile=quantile, min_gap_ns=1, outlier_factor=float("inf"), min_samples=1)
    for duration in durations:
        predictor.record(0, duration)
    remembered = durations[-predictor.window :]
    assert predictor.predict(0) == 0 or min(remembered) <= predictor.predict(0) <= max(remembered)


def test_quantiles_are_named_and_in_milliseconds() -> None:
    assert quantiles_ms([]) == {}
    assert quantiles_ms([MS * n for n in range(0, 101)]) == {"p10": 10, "p25": 25, "p50": 50, "p75": 75, "p90": 90}


@pytest.mark.parametrize("settings", [{"quantile": 1.5}, {"min_samples": 0}, {"min_samples": 20, "window": 12}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must lie between"):
        GapPredictor(**settings)  # type: ignore[arg-type]
