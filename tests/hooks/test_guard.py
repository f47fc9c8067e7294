"""The guard: which iterations are control, and what it makes of the two groups."""

from __future__ import annotations

import random

import pytest

from hydro_slurm.hooks.guard import MIN_CONTROL, Guard, is_control

SECRET = b"sixteen bytes...."


def test_all_ranks_draw_the_same_iterations_and_another_secret_draws_others() -> None:
    drawn = [is_control(SECRET, step, 0.05) for step in range(2000)]
    assert drawn == [is_control(SECRET, step, 0.05) for step in range(2000)]
    assert drawn != [is_control(b"another", step, 0.05) for step in range(2000)]
    assert 60 <= sum(drawn) <= 140


def test_the_share_is_kept_at_its_ends() -> None:
    assert not any(is_control(SECRET, step, 0.0) for step in range(100))
    assert all(is_control(SECRET, step, 1.0) for step in range(100))


def fed(slowdown: float, *, num: int = 400, drift: float = 0.0, seed: int = 1, **settings: float) -> Guard:
    guard, noise = Guard(**settings), random.Random(seed)  # type: ignore[arg-type]
    for step in range(num):
        control = step % 10 == 3
        duration_s = 0.4 * (1 + drift * step / num) * (1 + noise.gauss(0, 0.01)) * (1 if control else 1 + slowdown)
        guard.add(round(duration_s * 1e9), control=control)
    return guard


def test_no_estimate_before_there_are_enough_of_both() -> None:
    guard = fed(0.0, num=MIN_CONTROL)
    report = guard.report(learning=True)
    assert (report.state, report.slowdown, report.slowdown_ci95) == ("learning", None, None)


@pytest.mark.parametrize("slowdown", [0.0, 0.05, 0.3])
def test_the_interval_holds_the_truth(slowdown: float) -> None:
    report = fed(slowdown).report(learning=False)
    assert report.slowdown_ci95 is not None
    assert report.slowdown_ci95[0] <= slowdown <= report.slowdown_ci95[1]
    assert report.slowdown == pytest.approx(slowdown, abs=0.012)
    assert report.num_control + report.num_shared >= 390


def test_a_machine_that_slows_down_by_itself_is_not_blamed_on_the_bundles() -> None:
    report = fed(0.0, drift=1.0).report(learning=False)
    assert report.slowdown_ci95 is not None
    assert abs(report.slowdown_ci95[0]) < 0.03
    assert report.slowdown_ci95[0] <= 0 <= report.slowdown_ci95[1]


def test_it_shuts_when_even_the_lower_end_exceeds_the_bound_and_stays_shut() -> None:
    guard = fed(0.2, max_slowdown=0.01)
    assert guard.report(learning=False).state == "shut"
    for step in range(2000):
        guard.add(400_000_000, control=step % 10 == 3)
    assert guard.report(learning=False).state == "shut"


def test_it_stays_open_while_the_bound_is_not_clearly_exceeded() -> None:
    assert fed(0.0, max_slowdown=0.01).report(learning=False).state == "open"
    assert fed(0.2, max_slowdown=0.5).report(learning=False).state == "open"


def test_a_bound_that_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="max_slowdown"):
        Guard(max_slowdown=0)
