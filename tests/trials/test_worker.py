"""Bundles as processes: results, checkpoints, messages, signals, and gates that close or go."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hydro_slurm import formats
from hydro_slurm.errors import FormatError, HydroError
from hydro_slurm.gate.writer import GateWriter
from hydro_slurm.model import (
    BundleProgress,
    BundleSlot,
    BundleSpec,
    Device,
    InboxMessage,
    LaneSpec,
    Profile,
    TrialResult,
)
from hydro_slurm.timeline import read_timeline
from hydro_trials.planner import Limits
from hydro_trials.runtime import startup, worker
from hydro_trials.runtime.bundle_dir import BundleDir
from hydro_trials.runtime.checkpoints import list_checkpoints, read_checkpoint
from hydro_trials.runtime.plan import LanePlan
from hydro_trials.runtime.profile import profile_study
from hydro_trials.runtime.train import train

DEADLINE_S = 90.0

STUDY = """
import torch
from torch import nn
import hydro_trials as hydro

def build(width):
    size = round(32 * width)
    return nn.Sequential(nn.Linear(12, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 5))

def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 12, generator=generator)
    y = (x @ torch.randn(12, 5, generator=generator)).argmax(dim=1)
    return hydro.Data(train=(x[:160], y[:160]), valid=(x[160:], y[160:]))

def accuracy(output, target):
    return (output.argmax(dim=1) == target).float().mean()

study = hydro.Study(
    name="small", build=build, data=data, loss=nn.functional.cross_entropy, metrics={"accuracy": accuracy},
    optimizer="sgd", space={"lr": hydro.Float(1e-4, 1e-1, log=True)}, fixed={"momentum": 0.9},
    batch_size=16, steps=40, rungs=(10, 20, 40), width_scale=2,
)
"""


def lane(trial: int, lr: float = 0.01, **fields: Any) -> LaneSpec:
    return LaneSpec(trial, {"lr": lr}, seed=1000 + trial, **fields)


@pytest.fixture(scope="session")
def profile_of_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a profile of STUDY, so that no bundle has to make its own; it says that lanes are fused."""
    folder = tmp_path_factory.mktemp("profile")
    (folder / "profiled.py").write_text(STUDY)
    profile_study(folder / "profiled.py", folder, [1], Limits(budget_s=0), target=False, as_json=True)
    (path,) = folder.glob("*.json")
    profile = formats.read_record(Profile, path)
    formats.write_record(path, replace(profile, points=(replace(profile.points[0], kind="general"),)))
    return folder


@pytest.fixture
def make_bundle(tmp_path: Path, profile_of_study: Path) -> Callable[..., Path]:
    """Writes a bundle's directory; keyword arguments replace fields of its spec."""
    study_file = tmp_path / "small_study.py"
    study_file.write_text(STUDY)
    (tmp_path / "profiles").mkdir()
    for profile in profile_of_study.glob("*.json"):
        shutil.copy(profile, tmp_path / "profiles")

    def make(name: str = "b1", *, study: str | None = None, **fields: Any) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        file = study_file
        if study is not None:
            file = directory / "study_here.py"
            file.write_text(study)
        spec = BundleSpec(
            bundle=name,
            study="small",
            study_dir=str(tmp_path),
            study_file=str(file),
            purpose="search",
            width_scale=2.0,
            max_lanes=4,
            lanes=(lane(0), lane(1, 0.02), lane(2, 0.03)),
            rungs=(10, 20, 40),
            slot=BundleSlot("own", "n1", Device()),
            idle_exit_s=0.0,
        )
        formats.write_record(directory / "spec.json", replace(spec, **fields))
        return directory

    return make


@pytest.fixture(autouse=True)
def keep_signal_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def results_of(directory: Path) -> dict[tuple[int, int], TrialResult]:
    found = (formats.read_record(TrialResult, path) for path in (directory / "results").glob("*.json"))
    return {(result.trial, result.rung): result for result in found}


def values_of(directory: Path) -> dict[tuple[int, int], tuple[int, str, float | None, dict[str, float | None]]]:
    """What must not depend on when and where a lane was trained."""
    return {
        key: (r.step, r.state, r.value, {k: v for k, v in r.metrics.items() if k.startswith("valid")})
        for key, r in results_of(directory).items()
    }


def events_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]


def progress_of(directory: Path) -> BundleProgress:
    return formats.read_record(BundleProgress, directory / "progress.json")


def start(directory: Path) -> subprocess.Popen[bytes]:
    with (directory / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "hydro_trials", "train", str(directory)], stdout=log, stderr=subprocess.STDOUT
        )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], directory: Path) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, (directory / "log").read_text()
        assert time.monotonic() < end_s, "nothing came of it within the deadline"
        time.sleep(0.01)


@pytest.fixture
def whole(make_bundle: Callable[..., Path]) -> Path:
    """A bundle that ran from beginning to end without being disturbed."""
    directory = make_bundle("whole", rungs=(10, 20, 800), lanes=tuple(lane(t, 0.001) for t in range(3)))
    assert train(directory) == 0
    return directory


def test_every_rung_of_every_lane_has_a_result(make_bundle: Callable[..., Path]) -> None:
    directory = make_bundle(max_lanes=2, timeline=True)
    assert train(directory) == 0
    results = results_of(directory)
    assert {key: (r.step, r.state) for key, r in results.items()} == {
        (trial, rung): (step, state)
        for trial in range(3)
        for rung, (step, state) in enumerate([(10, "RUNNING"), (20, "RUNNING"), (40, "COMPLETE")])
    }
    for (trial, _), result in results.items():
        assert result.value == result.metrics["valid.loss"]
        assert set(result.metrics) == {"valid.loss", "valid.accuracy", "train.loss"}
        assert (result.checkpoint is None) == (result.state == "COMPLETE")
        assert f"lanes/{trial}/" in (result.checkpoint or f"lanes/{trial}/")
    assert 0 < results[0, 0].lane_seconds < results[0, 1].lane_seconds < results[0, 2].lane_seconds
    progress = progress_of(directory)
    assert (progress.state, progress.num_lanes, progress.num_waiting) == ("ended", 0, 0)
    assert progress.lane_steps == 3 * 40
    assert progress.compute_s > 0
    header, events = read_timeline(directory / "timeline.jsonl")
    assert header.node == "n1"
    assert sum((event.num_steps or 0) * (event.lanes or 0) for event in events) == progress.lane_steps


def test_a_result_names_a_checkpoint_of_its_own_step(make_bundle: Callable[..., Path]) -> None:
    directory = make_bundle()
    assert train(directory) == 0
    result = results_of(directory)[1, 1]
    assert result.checkpoint is not None
    checkpoint = read_checkpoint(Path(result.checkpoint), 1, 2.0)
    assert checkpoint.state.step == result.step == 20
    assert checkpoint.lane_seconds <= result.lane_seconds
    assert [path.name for path in list_checkpoints(directory / "lanes", 1)] == ["step-20.pt", "step-10.pt"]
    with pytest.raises(FormatError, match="holds trial 1 at width scale 2, needed trial 2"):
        read_checkpoint(Path(result.checkpoint), 2, 2.0)


def test_lanes_do_not_depend_on_how_many_share_a_bundle(make_bundle: Callable[..., Path]) -> None:
    together, apart = make_bundle("together"), make_bundle("apart", max_lanes=1)
    assert train(together) == train(apart) == 0
    assert values_of(together) == values_of(apart)


def test_a_diverging_lane_ends_alone(make_bundle: Callable[..., Path]) -> None:
    healthy = make_bundle("healthy")
    sick = make_bundle("sick", lanes=(lane(0), lane(7, 1e30), lane(1, 0.02), lane(2, 0.03)))
    assert train(healthy) == train(sick) == 0
    found = values_of(sick)
    (diverged,) = [result for result in results_of(sick).values() if result.trial == 7]
    assert (diverged.state, diverged.value, diverged.rung) == ("DIVERGED", None, 0)
    assert "not finite" in diverged.reason
    assert {key: value for key, value in found.items() if key[0] != 7} == values_of(healthy)


def test_a_lane_with_impossible_hyperparameters_fails_alone(make_bundle: Callable[..., Path]) -> None:
    directory = make_bundle(lanes=(lane(0), LaneSpec(1, {"lr": 0.1, "beta9": 1}, seed=1)))
    assert train(directory) == 0
    results = results_of(directory)
    assert results[1, 0].state == "FAIL"
    assert "beta9" in results[1, 0].reason
    assert results[0, 2].state == "COMPLETE"


def test_an_exception_in_the_study_s_code_ends_all_lanes_with_its_place(make_bundle: Callable[..., Path]) -> None:
    study = STUDY.replace("    return (output.argmax", "    raise ValueError('bad metric')\n    return (output.argmax")
    directory = make_bundle(study=study)
    assert train(directory) == 0
    results = results_of(directory)
    assert {key: result.state for key, result in results.items()} == {(t, 0): "FAIL" for t in range(3)}
    assert "study_here.py" in results[0, 0].reason
    assert "bad metric" in results[0, 0].reason


def test_a_study_that_cannot_be_used_is_one_line_and_exit_1(make_bundle: Callable[..., Path]) -> None:
    directory = make_bundle(study="import no_such_module\n")
    process = start(directory)
    assert process.wait(DEADLINE_S) == 1
    log = (directory / "log").read_text()
    assert log.startswith("hydro: ") and log.count("\n") == 1 and "no_such_module" in log
    assert events_of(directory)[-1]["event"] == "failed"


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"rungs": (20, 10)}, "needed rising"),
        ({"max_lanes": 0}, "1 or more"),
        ({"slot": BundleSlot("bubble", "n1", Device())}, "with a gate_dir"),
        ({"slot": BundleSlot("own", "n1", Device("gpu"))}, "'cpu' so far"),
    ],
)
def test_a_spec_that_cannot_run_is_refused(
    make_bundle: Callable[..., Path], fields: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(FormatError, match=complaint):
        train(make_bundle(**fields))
    with pytest.raises(FormatError, match="a bundle directory holds one"):
        BundleDir.read_spec(Path(__file__).parent)


def test_messages_refill_stop_and_finish(make_bundle: Callable[..., Path]) -> None:
    directory = make_bundle(rungs=(5, 100_000), idle_exit_s=60.0, lanes=(lane(0), lane(1)), max_lanes=2)
    process = start(directory)
    wait_until(lambda: len(results_of(directory)) >= 2, process, directory)
    formats.write_record(directory / "inbox" / "1.json", InboxMessage("refill", lanes=(lane(5), lane(6), lane(0))))
    formats.write_record(directory / "inbox" / "2.json", InboxMessage("stop", trials=(0, 6, 99), reason="pruned"))
    wait_until(lambda: (5, 0) in results_of(directory), process, directory)
    (directory / "inbox" / "3.json").write_text("noise")
    formats.write_record(directory / "inbox" / "4.json", InboxMessage("finish", reason="enough"))
    assert process.wait(DEADLINE_S) == 0
    assert set(results_of(directory)) == {(0, 0), (1, 0), (5, 0)}
    progress = progress_of(directory)
    assert progress.last_inbox == 4
    assert set(progress.checkpoints) == set(progress.steps) == {"1", "5"}
    for trial, path in progress.checkpoints.items():
        assert read_checkpoint(Path(path), int(trial), 2.0).state.step == progress.steps[trial]
    assert events_of(directory)[-1] | {"t_s": 0} == {
        "t_s": 0, "event": "left", "reason": "enough", "lanes": 2, "waiting": 0,
    }  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_lanes_that_go_on_elsewhere_end_as_if_never_interrupted(
    make_bundle: Callable[..., Path], whole: Path, number: signal.Signals
) -> None:
    lanes = tuple(lane(t, 0.001) for t in range(3))
    first = make_bundle("first", rungs=(10, 20, 800), lanes=lanes, checkpoint_every_s=0.1)
    process = start(first)

    def has_gone_far() -> bool:
        newest = [list_checkpoints(first / "lanes", trial)[:1] for trial in range(3)]
        return all(paths and int(paths[0].stem.removeprefix("step-")) > 20 for paths in newest)

    wait_until(has_gone_far, process, first)
    process.send_signal(number)
    status = process.wait(DEADLINE_S)
    if number == signal.SIGTERM:
        assert status == 0
        assert events_of(first)[-1]["reason"] == "SIGTERM"
        progress = progress_of(first)
        assert (progress.state, set(progress.checkpoints)) == ("ended", {"0", "1", "2"})
    checkpoints = [str(list_checkpoints(first / "lanes", trial)[0]) for trial in range(3)]
    assert all(result.state == "RUNNING" for result in results_of(first).values())
    second = make_bundle(
        "second",
        rungs=(10, 20, 800),
        lanes=tuple(replace(lanes[trial], checkpoint=checkpoints[trial]) for trial in range(3)),
    )
    assert train(second) == 0
    assert {**values_of(first), **values_of(second)} == values_of(whole)
    assert set(values_of(second)) == {(0, 2), (1, 2), (2, 2)}


def test_the_same_bundle_started_again_does_nothing_twice(make_bundle: Callable[..., Path]) -> None:
    directory = make_bundle()
    assert train(directory) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (directory / "results").iterdir()}
    assert train(directory) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (directory / "results").iterdir()} == before


def test_a_rung_whose_result_was_not_written_is_done_again(make_bundle: Callable[..., Path]) -> None:
    """Killed between a rung's checkpoint and its result."""
    directory = make_bundle("one")
    assert train(directory) == 0
    expected = values_of(directory)
    checkpoint = str(directory / "lanes" / "0" / "step-20.pt")
    again = make_bundle("two", lanes=(lane(0, checkpoint=checkpoint),))
    assert train(again) == 0
    assert values_of(again) == {key: value for key, value in expected.items() if key in ((0, 1), (0, 2))}


def test_a_damaged_checkpoint_gives_way_to_an_older_one(make_bundle: Callable[..., Path]) -> None:
    directory = make_bundle()
    assert train(directory) == 0
    expected = values_of(directory)
    again = make_bundle("again", lanes=(lane(0), lane(1, 0.02)))
    for trial in (0, 1):
        folder = again / "lanes" / str(trial)
        folder.mkdir(parents=True)
        for step in (10, 20):
            content = (directory / "lanes" / str(trial) / f"step-{step}.pt").read_bytes()
            damaged = step == 20 or trial == 1
            (folder / f"step-{step}.pt").write_bytes(content[: len(content) // 2] if damaged else content)
    assert train(again) == 0
    found = values_of(again)
    assert found == {key: value for key, value in expected.items() if key[0] in (0, 1)}
    admitted = {event["trial"]: event["step"] for event in events_of(again) if event["event"] == "admitted"}
    assert admitted == {0: 10, 1: 0}


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("owned",))


def test_a_checkpoint_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "hydro.checkpoint", "version": 1, "state": Payload()}, tmp_path / "step-1.pt")
    with pytest.raises(FormatError, match="cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "step-1.pt", 0, 1.0)
    assert not (tmp_path / "owned").exists()


OUT_OF_MEMORY = """
num_calls = [0]
def loss(output, target):
    num_calls[0] += 1
    if num_calls[0] == 15:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
    return nn.functional.cross_entropy(output, target)

study"""


def test_out_of_memory_halves_the_lanes_and_goes_on(make_bundle: Callable[..., Path]) -> None:
    study = STUDY.replace("\nstudy", OUT_OF_MEMORY).replace("loss=nn.functional.cross_entropy", "loss=loss")
    lanes = tuple(lane(trial) for trial in range(4))
    short, plenty = make_bundle("short", study=study, lanes=lanes), make_bundle("plenty", lanes=lanes)
    assert train(short) == train(plenty) == 0
    assert [e["max_lanes"] for e in events_of(short) if e["event"] == "resized"] == [2]
    progress = formats.read_record(BundleProgress, short / "progress.json")
    assert progress.max_lanes == 2
    assert "4 lanes are too many, half of them go on: out of memory" in progress.warning
    assert values_of(short) == values_of(plenty)


SECOND_METRIC_RAISES = """
num_calls = [0]
def accuracy(output, target):
    num_calls[0] += 1
    if num_calls[0] == 2:
        raise ValueError("this output means nothing")
    return (output.argmax(dim=1) == target).float().mean()

study"""


def test_a_metric_that_raises_for_one_lane_ends_that_lane_alone(make_bundle: Callable[..., Path]) -> None:
    lanes = tuple(lane(trial) for trial in range(3))
    sick = make_bundle("sick", study=STUDY.replace("\nstudy", SECOND_METRIC_RAISES), lanes=lanes)
    well = make_bundle("well", lanes=lanes)
    assert train(sick) == train(well) == 0
    ended = {result.trial: result for result in results_of(sick).values() if result.state != "RUNNING"}
    assert {trial: result.state for trial, result in ended.items()} == {0: "COMPLETE", 1: "FAIL", 2: "COMPLETE"}
    assert "study_here.py" in ended[1].reason
    assert "this output means nothing" in ended[1].reason
    assert {at: value for at, value in values_of(sick).items() if at[0] != 1} == {
        at: value for at, value in values_of(well).items() if at[0] != 1
    }


CULPRIT = """
def loss(output, target):
    if not torch._C._functorch.is_batchedtensor(output) and not float(output.detach().abs().max()) <= 1e3:
        raise ValueError("one lane's trouble")
    if torch._C._functorch.is_batchedtensor(output):
        num_calls[0] += 1
        if num_calls[0] == 4:
            raise ValueError("something went wrong in the bundle")
    return nn.functional.cross_entropy(output, target)

num_calls = [0]
study"""


def test_a_step_that_raises_ends_the_lane_whose_doing_it_is(make_bundle: Callable[..., Path]) -> None:
    study = STUDY.replace("\nstudy", CULPRIT).replace("loss=nn.functional.cross_entropy", "loss=loss")
    bad = replace(lane(1), params={"lr": 1e7})
    sick = make_bundle("sick", study=study, lanes=(lane(0), bad, lane(2)))
    assert train(sick) == 0
    ended = {result.trial: result for result in results_of(sick).values() if result.state != "RUNNING"}
    assert {trial: result.state for trial, result in ended.items()} == {0: "COMPLETE", 1: "FAIL", 2: "COMPLETE"}
    assert "one lane's trouble" in ended[1].reason


def test_a_model_that_cannot_be_fused_runs_lane_by_lane_with_a_warning(make_bundle: Callable[..., Path]) -> None:
    study = STUDY.replace("\nstudy", CANNOT_FUSE).replace("loss=nn.functional.cross_entropy", "loss=loss")
    directory = make_bundle(study=study, lanes=(lane(0), lane(1), lane(2)))
    assert train(directory) == 0
    assert len([result for result in results_of(directory).values() if result.state == "COMPLETE"]) == 3
    progress = formats.read_record(BundleProgress, directory / "progress.json")
    assert progress.max_lanes == 1
    assert "torch.Tensor.__bool__ in the loss cannot be fused" in progress.warning


CANNOT_FUSE = """
def loss(output, target):
    value = nn.functional.cross_entropy(output, target)
    return value if value > 0 else value * 2

study"""


def test_a_bundle_is_resized_by_message(make_bundle: Callable[..., Path]) -> None:
    lanes = tuple(lane(trial) for trial in range(4))
    small, plenty = make_bundle("small", lanes=lanes), make_bundle("plenty", lanes=lanes)
    (small / "inbox").mkdir()
    formats.write_record(small / "inbox" / "1.json", InboxMessage("resize", max_lanes=1))
    assert train(small) == train(plenty) == 0
    assert values_of(small) == values_of(plenty)
    assert formats.read_record(BundleProgress, small / "progress.json").max_lanes == 1


def test_coming_close_to_the_cap_sheds_lanes_once_not_again_and_again(
    make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {"bytes": 900}
    resize = worker.BundleWorker._resize
    monkeypatch.setattr(worker, "resident_bytes", lambda device: held["bytes"])

    def shed(self: worker.BundleWorker, max_lanes: int) -> None:
        resize(self, max_lanes)
        monkeypatch.setattr(worker, "give_back_free", lambda device: held.update(bytes=500))

    monkeypatch.setattr(worker.BundleWorker, "_resize", shed)
    monkeypatch.setattr(worker, "give_back_free", lambda device: None)  # nothing is free: the lanes hold it all
    monkeypatch.setattr(LanePlan, "most_lanes", lambda self, spec: spec.max_lanes)
    lanes = tuple(lane(trial) for trial in range(4))
    directory = make_bundle(lanes=lanes, memory_cap_bytes=800, rungs=(10, 3000))
    assert train(directory) == 0
    assert [e["max_lanes"] for e in events_of(directory) if e["event"] == "resized"] == [2]
    assert (
        "holding 900 bytes, the cap is 800" in formats.read_record(BundleProgress, directory / "progress.json").warning
    )


def test_results_wait_while_the_disk_refuses_them(
    make_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_bundle()
    write, refusals = formats.write_record, [5]

    def refuse(path: Path, record: Any, **options: Any) -> None:
        if path.parent.name == "results" and refusals[0] > 0:
            refusals[0] -= 1
            raise OSError(28, "No space left on device")
        write(path, record, **options)

    monkeypatch.setattr(formats, "write_record", refuse)
    assert train(directory) == 0
    assert refusals == [0]
    assert len(results_of(directory)) == 9


def test_a_verifying_bundle_trains_the_target(make_bundle: Callable[..., Path]) -> None:
    directory = make_bundle(purpose="verify", width_scale=1.0, rungs=(40,))
    assert train(directory) == 0
    assert {key: r.state for key, r in results_of(directory).items()} == {(t, 0): "COMPLETE" for t in range(3)}


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[GateWriter]:
    with GateWriter.create(tmp_path / "gate", stage=0, num_stages=2) as writer:
        yield writer


def in_bubble(gate: GateWriter) -> dict[str, Any]:
    cpus = (min(os.sched_getaffinity(0)),)
    return {"slot": BundleSlot("bubble", "n1", Device("cpu", 0, cpus), str(gate.directory), job_id=5)}


def hold_open(gate: GateWriter) -> bool:
    """Renew the lease, as a host would; start-up may take long on a busy machine, because it yields."""
    gate.open(time.monotonic_ns() + 2_000_000_000)
    return True


def test_behind_a_gate_lanes_end_as_without_one(make_bundle: Callable[..., Path], gate: GateWriter) -> None:
    free, gated = make_bundle("free"), make_bundle("gated", timeline=True, **in_bubble(gate))
    process = start(gated)
    leases: list[tuple[int, int]] = []
    end_s = time.monotonic() + DEADLINE_S
    while process.poll() is None:
        assert time.monotonic() < end_s
        now_ns = time.monotonic_ns()
        leases.append((now_ns, now_ns + 30_000_000))
        gate.open(leases[-1][1])
        time.sleep(0.02)
        gate.close()
        time.sleep(0.01)
    assert process.returncode == 0
    assert train(free) == 0
    assert values_of(gated) == values_of(free)
    _, events = read_timeline(gated / "timeline.jsonl")
    assert len(events) > 1
    for event in events:  # every run began within a lease
        assert any(start_ns <= event.t_ns < end_ns for start_ns, end_ns in leases)


def test_sigterm_takes_effect_while_the_gate_is_closed(make_bundle: Callable[..., Path], gate: GateWriter) -> None:
    directory = make_bundle(rungs=(10, 1_000_000), **in_bubble(gate))
    process = start(directory)
    wait_until(lambda: hold_open(gate) and len(results_of(directory)) == 3, process, directory)
    gate.close()
    process.terminate()
    assert process.wait(DEADLINE_S) == 0
    assert set(progress_of(directory).checkpoints) == {"0", "1", "2"}


def test_a_bundle_leaves_with_its_checkpoints_when_the_host_does(
    make_bundle: Callable[..., Path], gate: GateWriter
) -> None:
    directory = make_bundle(rungs=(10, 1_000_000), **in_bubble(gate))
    process = start(directory)
    wait_until(lambda: hold_open(gate) and len(results_of(directory)) == 3, process, directory)
    gate.leave()
    assert process.wait(DEADLINE_S) == 76
    progress = progress_of(directory)
    for trial, path in progress.checkpoints.items():
        assert read_checkpoint(Path(path), int(trial), 2.0).state.step == progress.steps[trial] >= 10
    assert set(progress.checkpoints) == {"0", "1", "2"}


def test_a_gate_that_was_never_there_is_an_error(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    slot = BundleSlot("bubble", "n1", Device(), str(tmp_path / "no-gate"))
    with pytest.raises(HydroError, match="no gate"):
        train(make_bundle(slot=slot))


def test_start_up_yields_and_training_does_not() -> None:
    policies: list[int] = []
    answer = startup.run_yielding(lambda: policies.append(os.sched_getscheduler(0)) or 5)  # type: ignore[func-returns-value]
    policies.append(os.sched_getscheduler(0))
    assert answer == 5
    assert policies == [os.SCHED_IDLE, os.SCHED_OTHER]
    with pytest.raises(ZeroDivisionError):
        startup.run_yielding(lambda: 1 // 0)


def test_a_binding_that_is_not_permitted_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    assert not startup.bind_to_cpus((100_000,))
    assert "cannot bind to CPUs" in caplog.text
    assert startup.bind_to_cpus(())


def test_exit_statuses_are_what_the_controller_expects() -> None:
    assert (worker.EXIT_OK, worker.EXIT_GATE_GONE) == (0, 76)
