"""The search counts every trial once, whatever crashes, and prunes with Optuna's pruners."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from hydro_slurm.errors import StudyError
from hydro_slurm.model import TrialResult
from hydro_slurm.study.description import StudyDescription
from hydro_slurm.study.search import Search
from hydro_slurm.study.storage import JOURNAL_NAME, repair_torn_tail

RUNGS = (10, 20, 40)


def make_description(**changes: object) -> StudyDescription:
    space = {"lr": optuna.distributions.distribution_to_json(optuna.distributions.FloatDistribution(1e-4, 1, log=True))}
    settings: dict[str, object] = {
        "name": "s",
        "space": space,
        "fixed": {"momentum": 0.9},
        "objective": "valid.loss",
        "direction": "minimize",
        "trials": 12,
        "steps": RUNGS[-1],
        "rungs": RUNGS,
        "batch_size": 8,
        "width_scale": 4.0,
        "max_lanes": 4,
        "top_k": 3,
        "seed": 7,
        "sampler": "tpe",
        "pruner": "none",
        "optimizer": "sgd",
    }
    return StudyDescription(**{**settings, **changes})  # type: ignore[arg-type]


def result(trial: int, rung: int, value: float | None, state: str | None = None, **more: object) -> TrialResult:
    state = state or ("COMPLETE" if rung == len(RUNGS) - 1 else "RUNNING")
    return TrialResult(
        trial=trial,
        rung=rung,
        step=RUNGS[rung],
        state=state,
        value=value,
        metrics={},
        bundle="b001",
        lane_seconds=1.0,
        written_at_s=0.0,
        **more,  # type: ignore[arg-type]
    )


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.getLogger("hydro_slurm").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("hydro_slurm").setLevel(logging.NOTSET)


def test_lanes_carry_fixed_and_searched_hyperparameters(tmp_path: Path) -> None:
    lanes = Search(make_description(), tmp_path).take(3)
    assert [lane.trial for lane in lanes] == [0, 1, 2]
    assert all(lane.params["momentum"] == 0.9 and 1e-4 <= lane.params["lr"] <= 1 for lane in lanes)
    assert len({lane.seed for lane in lanes}) == 3


def test_a_study_ends_when_each_trial_has_ended(tmp_path: Path) -> None:
    search = Search(make_description(trials=3), tmp_path)
    assert len(search.take(10)) == 3
    assert search.take(1) == []
    search.record([result(0, 2, 0.5), result(1, 1, None, "DIVERGED"), result(2, 0, None, "FAIL", reason="boom")])
    assert search.finished
    counts = search.counts()
    assert (counts["COMPLETE"], counts["DIVERGED"], counts["FAIL"]) == (1, 1, 1)
    assert [trial.number for trial in search.top(3)] == [0]


def test_taking_a_result_in_twice_changes_nothing(tmp_path: Path) -> None:
    search = Search(make_description(), tmp_path)
    search.take(2)
    results = [result(0, 0, 0.5), result(0, 2, 0.4), result(1, 0, 0.7)]
    search.record(results)
    before = (tmp_path / JOURNAL_NAME).read_text()
    search.record([result(0, 0, 0.9), result(0, 2, 0.9)])
    assert search.top(1)[0].value == 0.4
    assert len((tmp_path / JOURNAL_NAME).read_text().splitlines()) == len(before.splitlines())


def test_a_restarted_search_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    first = Search(make_description(trials=6), tmp_path)
    lanes = first.take(4)
    first.record([result(1, 2, 0.3)])
    again = Search(make_description(trials=6), tmp_path)
    assert again.counts()["WAITING"] == 5
    back = again.take(6)
    assert [lane.trial for lane in back] == [0, 2, 3, 4, 5]
    assert [lane.params for lane in back[:3]] == [lanes[i].params for i in (0, 2, 3)]
    assert [lane.seed for lane in back[:3]] == [lanes[i].seed for i in (0, 2, 3)]
    again.record([result(lane.trial, 2, 0.1) for lane in back])
    assert again.finished
    assert again.counts()["COMPLETE"] == 6


def test_a_trial_whose_asking_was_cut_off_gets_its_hyperparameters_later(tmp_path: Path) -> None:
    first = Search(make_description(trials=2), tmp_path)
    first._study.ask()  # created, but killed before anything was suggested
    lanes = Search(make_description(trials=2), tmp_path).take(2)
    assert [lane.trial for lane in lanes] == [0, 1]
    assert all(1e-4 <= lane.params["lr"] <= 1 for lane in lanes)
    again = Search(make_description(trials=2), tmp_path).take(2)
    assert [lane.params for lane in again] == [lane.params for lane in lanes]


def test_a_lost_trial_waits_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    search = Search(make_description(), tmp_path)
    search.take(2)
    search.give_back([0, 1], {1: "/x/step-20.pt"})
    lanes = search.take(2)
    assert [(lane.trial, lane.checkpoint) for lane in lanes] == [(0, None), (1, "/x/step-20.pt")]


def test_a_trial_that_kills_its_bundles_is_given_up(tmp_path: Path) -> None:
    search = Search(make_description(trials=2), tmp_path)
    for _ in range(3):
        search.take(1)
        search.give_back([0])
    assert search.counts()["FAIL"] == 1
    assert "died 3 times" in search.trials()[0].user_attrs["reason"]
    assert search.take(5)[0].trial == 1


def test_a_rung_in_between_forgives_losses_and_so_does_leaving_in_peace(tmp_path: Path) -> None:
    search = Search(make_description(trials=1), tmp_path)
    for rung in (0, 0, 1, 1):
        search.take(1)
        search.record([result(0, rung, 0.5)])
        search.give_back([0])
        search.take(1)
        search.give_back([0], lost=False)
    assert search.counts()["WAITING"] == 1


def test_pruned_trials_are_named_and_stay_pruned(tmp_path: Path) -> None:
    search = Search(make_description(trials=8, max_lanes=8, pruner="successive_halving"), tmp_path)
    search.take(8)
    stopped = search.record([result(trial, 0, 1.0 + trial) for trial in range(8)])
    assert stopped
    assert 0 not in stopped
    late = stopped[0]
    search.record([result(late, 2, 0.0)])  # it finished before it heard of it
    assert search.counts()["PRUNED"] == len(stopped)
    assert all(trial.number != late for trial in search.top(3))


def test_maximize_ranks_the_other_way(tmp_path: Path) -> None:
    search = Search(make_description(direction="maximize"), tmp_path)
    search.take(3)
    search.record([result(trial, 2, float(trial)) for trial in range(3)])
    assert [trial.number for trial in search.top(2)] == [2, 1]


def test_a_journal_cut_at_any_byte_of_its_last_record_is_repaired(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    search = Search(make_description(trials=3), whole)
    search.take(2)
    search.record([result(0, 2, 0.5)])
    data = (whole / JOURNAL_NAME).read_bytes()
    start = data.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(start + 1, len(data)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / JOURNAL_NAME).write_bytes(data[:cut])
        assert repair_torn_tail(folder / JOURNAL_NAME) == cut - start
        assert (folder / JOURNAL_NAME).read_bytes() == data[:start]
        assert (folder / f"{JOURNAL_NAME}.torn").read_bytes() == data[start:cut]
    again = Search(make_description(trials=3), folder)
    assert again.counts()["WAITING"] == 3  # the result that was cut off is not known, its trial goes on


def test_a_journal_that_is_damaged_in_the_middle_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL_NAME
    lines = [json.dumps({"op_code": 0})] * 3
    path.write_text("\n".join([lines[0], "{broken", lines[2]]) + "\n")
    before = path.read_bytes()
    with pytest.raises(StudyError, match="damaged at byte"):
        repair_torn_tail(path)
    assert path.read_bytes() == before


def test_a_bundle_is_given_trials_that_may_share_it_and_no_trial_is_forgotten(tmp_path: Path) -> None:
    sizes = optuna.distributions.CategoricalDistribution([8, 16])
    space = {**make_description().space, "batch_size": optuna.distributions.distribution_to_json(sizes)}
    search = Search(make_description(space=space, sampler="random"), tmp_path, ("batch_size",))
    given = []
    while search.num_waiting:
        bundle = search.take(3)
        assert len({lane.params["batch_size"] for lane in bundle}) == 1
        joining = search.take(1, (bundle[0].params["batch_size"],))
        assert all(lane.params["batch_size"] == bundle[0].params["batch_size"] for lane in joining)
        given += [lane.trial for lane in (*bundle, *joining)]
    assert sorted(given) == list(range(12))
    assert search.take(1) == []
