"""Studies in the bubbles of a running host job, on a real Slurm cluster, through what may happen to them there."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from workbench import Workbench

from hydro_slurm import formats
from hydro_slurm.model import BundleProgress, BundleSpec, TrialResult
from hydro_slurm.study.description import read_study
from hydro_slurm.study.report import StudySummary
from hydro_slurm.testbed import Testbed


def specs(directory: Path) -> list[BundleSpec]:
    return [formats.read_record(BundleSpec, path) for path in sorted(directory.glob("bundles/*/spec.json"))]


def running_progress(directory: Path, min_steps: int) -> BundleProgress | None:
    """The progress of a bundle that has come some way."""
    for path in sorted(directory.glob("bundles/*/progress.json")):
        progress = formats.read_record(BundleProgress, path)
        if progress.state == "running" and progress.lane_steps >= min_steps:
            return progress
    return None


def check_counted_once(directory: Path, summary: StudySummary, num_trials: int) -> None:
    """Every trial has ended exactly once, and each that is COMPLETE has exactly one final result."""
    ended = {state: summary.counts[state] for state in ("COMPLETE", "PRUNED", "FAIL", "DIVERGED")}
    assert sum(ended.values()) == num_trials
    assert summary.counts["WAITING"] == summary.counts["RUNNING"] == 0
    search = {spec.bundle for spec in specs(directory) if spec.purpose == "search"}
    results = [formats.read_record(TrialResult, path) for path in directory.glob("bundles/*/results/*.json")]
    final = [result.trial for result in results if result.bundle in search and result.state == "COMPLETE"]
    assert len(final) == len(set(final))
    journal = [json.loads(line) for line in (directory / "optuna.journal").read_text().splitlines()]
    told = [record["trial_id"] for record in journal if record["op_code"] == 6 and record["state"] in (1, 2, 3)]
    assert sorted(told) == list(range(num_trials))


def test_a_study_runs_in_the_bubbles_of_a_host_job(desk: Workbench) -> None:
    host = desk.submit_host(num_nodes=2)
    job_id, directory = desk.submit_study(desk.study_file(), "--own-allocation=never")
    seen = desk.wait(
        "bundles as steps of the host job",
        lambda: [step for step in desk.client.steps(host) if step.name.startswith("hydro:small:")],
    )
    assert {step.job_id for step in seen} == {host}
    summary = desk.wait_summary(directory, job_id)
    check_counted_once(directory, summary, 8)
    assert summary.counts["FAIL"] == summary.counts["DIVERGED"] == 0
    assert summary.best is not None
    assert len(summary.verified) == min(2, summary.counts["COMPLETE"]) > 0
    assert all(found.state == "COMPLETE" and found.target_value is not None for found in summary.verified)
    assert {spec.slot.job_id for spec in specs(directory)} == {host}
    assert {spec.slot.node for spec in specs(directory)} == set(desk.client.job(host).nodes)
    assert {(spec.purpose, spec.width_scale) for spec in specs(directory)} == {("search", 4.0), ("verify", 1.0)}
    record = read_study(directory)
    assert 0 < record.lane_bytes < record.target_lane_bytes
    shown = desk.hydro("study", "show", "small").stdout
    assert "phase finished" in shown
    assert "verified 1: trial" in shown
    listed = json.loads(desk.hydro("study", "ls", "--json").stdout)
    assert [(row["name"], row["phase"]) for row in listed] == [("small", "finished")]


def test_a_bundle_that_is_killed_loses_no_trial(desk: Workbench) -> None:
    host = desk.submit_host()
    job_id, directory = desk.submit_study(
        desk.study_file(steps=3000), "--own-allocation=never", "--checkpoint-every-s=0.5"
    )
    progress = desk.wait("a bundle under way", lambda: running_progress(directory, 600))
    assert Path(f"/proc/{progress.pid}/oom_score_adj").read_text().strip() == "1000", "the host would die first"
    os.kill(progress.pid, signal.SIGKILL)
    summary = desk.wait_summary(directory, job_id)
    check_counted_once(directory, summary, 8)
    assert summary.counts["FAIL"] == 0
    resumed = [lane for spec in specs(directory)[1:] if spec.purpose == "search" for lane in spec.lanes]
    assert any(lane.checkpoint for lane in resumed), "no lane went on from a checkpoint"
    assert desk.client.job(host).state == "RUNNING"


def test_a_host_that_ends_gives_its_trials_back(desk: Workbench) -> None:
    first = desk.submit_host(name="first")
    job_id, directory = desk.submit_study(desk.study_file(steps=3000), "--own-allocation=never")
    desk.wait("a bundle under way", lambda: running_progress(directory, 400))
    desk.run(["touch", str(desk.home / "first.stop")])
    assert desk.client.wait_job(first, timeout_s=60) == "COMPLETED"
    status = desk.wait(
        "the trials to wait again",
        lambda: (s := desk.status(directory)) and s.counts["RUNNING"] == 0 and not s.bundles and s,
    )
    assert status.counts["FAIL"] == 0
    assert sum(status.counts.values()) == 8
    second = desk.submit_host(name="second")
    summary = desk.wait_summary(directory, job_id)
    check_counted_once(directory, summary, 8)
    assert summary.counts["FAIL"] == 0
    assert {spec.slot.job_id for spec in specs(directory)} == {first, second}
    moved = [lane for spec in specs(directory) if spec.slot.job_id == second for lane in spec.lanes]
    assert any(lane.checkpoint for lane in moved), "what was trained in the first host's bubbles was thrown away"


def test_slurmctld_may_be_down_for_half_a_minute(desk: Workbench, testbed: Testbed) -> None:
    desk.submit_host()
    job_id, directory = desk.submit_study(desk.study_file(steps=1500), "--own-allocation=never")
    before = desk.wait("a bundle under way", lambda: running_progress(directory, 100))
    testbed.stop_controller()
    try:
        desk.wait(
            "the study to notice",
            lambda: (s := desk.status(directory)) and "Slurm does not answer" in s.sentence,
            timeout_s=60,
        )
        desk.wait("30 s without slurmctld", clock_after(30.0), timeout_s=60)
        during = running_progress(directory, 0)
        assert during is None or during.lane_steps > before.lane_steps, "the bundle stood still"
    finally:
        testbed.start_controller()
    summary = desk.wait_summary(directory, job_id, timeout_s=240)
    check_counted_once(directory, summary, 8)
    assert summary.counts["FAIL"] == 0


def clock_after(seconds: float):
    import time

    end_s = time.monotonic() + seconds
    return lambda: time.monotonic() >= end_s


def test_a_controller_that_is_killed_goes_on_with_the_same_trials(desk: Workbench) -> None:
    desk.submit_host()
    job_id, directory = desk.submit_study(desk.study_file(steps=1500), "--own-allocation=never")
    desk.wait("a bundle under way", lambda: running_progress(directory, 200))
    desk.client.cancel(job_id, signal="KILL")
    desk.client.cancel(job_id)
    assert desk.client.wait_job(job_id, timeout_s=60) in ("CANCELLED", "FAILED")
    job_id = desk.sbatch_study(str(directory))
    summary = desk.wait_summary(directory, job_id)
    check_counted_once(directory, summary, 8)


def test_plain_sbatch_runs_a_study_file_and_goes_on_with_it_the_second_time(desk: Workbench) -> None:
    desk.submit_host()
    arguments = (str(desk.study_file(steps=1500)), "--own-allocation=never", "--poll-s=0.3", "--slurm-poll-s=1")
    first = desk.sbatch_study(*arguments)
    directory = desk.home / "hydro/studies/small"
    desk.wait("a bundle under way", lambda: running_progress(directory, 200))
    desk.client.cancel(first)
    assert desk.client.wait_job(first, timeout_s=60) == "CANCELLED"
    before = len(specs(directory))
    second = desk.sbatch_study(*arguments)
    summary = desk.wait_summary(directory, second)
    check_counted_once(directory, summary, 8)
    assert summary.counts["FAIL"] == 0
    assert len(specs(directory)) > before > 0
    assert [path.name for path in directory.parent.iterdir()] == ["small"]
    assert desk.client.wait_job(second, timeout_s=60) == "COMPLETED"


def test_batch_sizes_that_cannot_share_a_bundle_get_bundles_of_their_own(desk: Workbench) -> None:
    """Nobody says so in the study file: the model has a batch norm, and the check finds it."""
    text = desk.study_file(steps=60).read_text()
    text = text.replace(
        "nn.Linear(8, hidden), nn.ReLU(), ", "nn.Linear(8, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), "
    )
    text = text.replace("log=True)}", 'log=True), "batch_size": hydro.Categorical([8, 32])}')
    job_id, directory = desk.submit_study(
        desk.write("grouped.py", text), "--own-allocation=always", "--host-wait-s=1", "--mem=2000M"
    )
    summary = desk.wait_summary(directory, job_id)
    check_counted_once(directory, summary, 8)
    assert summary.counts["FAIL"] == 0
    assert read_study(directory).separates == ("batch_size",)
    sizes = [{lane.params["batch_size"] for lane in spec.lanes} for spec in specs(directory)]
    assert all(len(found) == 1 for found in sizes)
    assert {8, 32} <= set().union(*sizes)


def test_without_a_host_a_study_may_use_its_own_allocation(desk: Workbench) -> None:
    job_id, directory = desk.submit_study(desk.study_file(steps=60), "--host-wait-s=1", "--mem=2000M")
    summary = desk.wait_summary(directory, job_id)
    check_counted_once(directory, summary, 8)
    assert {spec.slot.kind for spec in specs(directory)} == {"own"}
    desk.client.wait_job(job_id, timeout_s=60)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module_anywhere\n", "no_such_module_anywhere"),
        ("x = 1\n", "found none"),
        ("EMPTY_SPACE", "Study.space"),
        ("BROKEN_BUILD", "the model cannot be built"),
    ],
)
def test_a_bad_study_file_is_refused_before_anything_is_submitted(desk: Workbench, text: str, message: str) -> None:
    good = desk.study_file().read_text()
    if text == "EMPTY_SPACE":
        text = good.replace('space={"lr": hydro.Float(1e-4, 1e-1, log=True)}', "space={}")
    if text == "BROKEN_BUILD":
        text, message = good.replace("hidden = round(32 * width)", "hidden = 1 // 0"), "ZeroDivisionError"
    done = desk.hydro("study", "submit", str(desk.write("bad.py", text)), check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("hydro: ")
    assert not list(desk.home.glob("hydro/studies/*"))
    assert desk.client.jobs(user=desk.user) == []


def test_a_second_study_of_the_same_name_is_refused(desk: Workbench) -> None:
    file = desk.study_file()
    desk.submit_study(file, "--hold")
    done = desk.hydro("study", "submit", str(file), check=False)
    assert done.returncode == 1
    assert "a study called 'small' exists" in done.stderr


def test_what_sbatch_refuses_leaves_nothing_behind(desk: Workbench) -> None:
    done = desk.hydro("study", "submit", str(desk.study_file()), "--partition=nowhere", check=False)
    assert done.returncode == 1
    assert "nowhere" in done.stderr or "partition" in done.stderr
    assert not list(desk.home.glob("hydro/studies/*"))


def test_a_study_that_does_not_exist_is_named(desk: Workbench) -> None:
    done = desk.hydro("study", "show", "nothing", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no study is called 'nothing'" in done.stderr


def test_run_outside_a_job_says_what_to_do(desk: Workbench) -> None:
    done = desk.hydro("study", "run", str(desk.study_file()), check=False)
    assert done.returncode == 1
    assert "hydro study submit" in done.stderr


def test_without_slurm_commands_one_line_says_so(desk: Workbench) -> None:
    import sys

    file = desk.study_file()
    argv = ["env", "PATH=/nowhere", sys.executable, "-m", "hydro_slurm.cli.main", "study", "submit", str(file)]
    done = desk.run(argv, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Slurm" in done.stderr
    assert not list(desk.home.glob("hydro/studies/*"))
