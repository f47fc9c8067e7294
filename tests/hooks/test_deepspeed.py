"""The DeepSpeed hook on a real pipeline of two processes: same numbers, right gates, and failures that stay inside."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hydro_slurm.errors import ConfigError
from hydro_slurm.formats import read_record
from hydro_slurm.gate.reader import GateReader
from hydro_slurm.hooks.deepspeed import share_bubbles
from hydro_slurm.model import SlotReport
from hydro_slurm.timeline import TimelineEvent, read_timeline

MICROBATCHES = 4


class Outcome(NamedTuple):
    results: list[dict[str, Any]]
    logs: list[str]
    reports: list[SlotReport]
    states_at_end: list[str]
    num_reports_left: int
    events: list[list[TimelineEvent]]


@pytest.fixture(scope="module")
def outcome(deepspeed_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("pipeline")
    processes = []
    for rank in range(2):
        environment = {
            **deepspeed_environment,
            "SLURM_JOB_ID": "41",
            "SLURMD_NODENAME": "n1",
            "SLURM_LOCALID": str(rank),
            "HYDRO_RUN": str(folder / "run"),
            "HYDRO_REPORT_DIR": str(folder / "slots"),
        }
        program = [sys.executable, str(Path(__file__).with_name("pipeline_program.py")), str(rank), str(folder)]
        with (folder / f"log.{rank}").open("w") as log:
            processes.append(
                subprocess.Popen(
                    program, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                )
            )
    try:
        for process in processes:
            wait_for_line(process, "SHARED", folder)
        reports = [wait_for_learned(folder / "slots" / f"41.n1.{rank}.json") for rank in range(2)]
        readers = [GateReader.attach(Path(report.gate_dir)) for report in reports]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        states = [wait_for_end(reader) for reader in readers]
        results = [json.loads(wait_for_line(process, "{", folder)) for process in processes]
        for process in processes:
            assert process.wait(60) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = [(folder / f"log.{rank}").read_text() for rank in range(2)]
    num_left = len(list((folder / "slots").iterdir()))
    events = [read_timeline(folder / "timeline" / f"host.41.n1.{rank}.jsonl")[1] for rank in range(2)]
    return Outcome(results, logs, reports, states, num_left, events)


def wait_for_line(process: subprocess.Popen[str], start: str, folder: Path) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return line
    logs = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("log.*")))
    raise AssertionError(f"a rank ended before it printed {start!r}:\n{logs}")


def wait_for_end(reader: GateReader) -> str:
    end_s = time.monotonic() + 60
    while (state := reader.state()) != "gone" and time.monotonic() < end_s:
        time.sleep(0.02)
    return state


def wait_for_learned(path: Path) -> SlotReport:
    end_s = time.monotonic() + 30
    while True:
        if path.exists() and (report := read_record(SlotReport, path)).iteration_s is not None:
            return report
        assert time.monotonic() < end_s, f"{path} never said that learning has finished"
        time.sleep(0.05)


def test_losses_are_bit_equal_with_the_hook_and_with_a_broken_one(outcome: Outcome) -> None:
    for result in outcome.results:
        assert len(set(result["alone"]["losses"])) > 10, "training has to train"
        assert result["sharing"]["losses"] == result["alone"]["losses"]
        assert result["broken"]["losses"] == result["alone"]["losses"]
        assert result["not attached"]["loss"] == result["alone"]["losses"][0]


def test_a_broken_gate_disables_itself_with_one_line(outcome: Outcome) -> None:
    for result, log in zip(outcome.results, outcome.logs, strict=True):
        assert result["broken"]["disabled"]
        assert log.count("bubble sharing is off from now on") == 1
        assert "No space left on device" in log
        assert log.count("bubbles are not shared, training goes on") == 1
        assert result["not attached"]["reporter"] == "None"


def test_the_gate_is_closed_to_neighbours_during_evaluation(outcome: Outcome) -> None:
    for result in outcome.results:
        assert result["sharing"]["evaluation_states"]
        assert set(result["sharing"]["evaluation_states"]) == {"closed"}


def test_the_report_describes_the_slot(outcome: Outcome) -> None:
    for rank, (report, result) in enumerate(zip(outcome.reports, outcome.results, strict=True)):
        assert (report.node, report.job_id, report.local_rank, report.global_rank) == ("n1", 41, rank, rank)
        assert (report.stage, report.num_stages) == (rank, 2)
        assert report.gate_dir == result["sharing"]["gate_dir"]
        assert report.device.kind == "cpu"
        assert report.device.cpus
        assert report.free_bytes > 0
        assert result["sharing"]["num_usable"] > 0
        assert report.bubble_s_per_s > 0


def test_at_the_end_the_gate_is_gone_the_report_removed_and_the_engine_as_before(outcome: Outcome) -> None:
    assert outcome.states_at_end == ["gone", "gone"]
    assert outcome.num_reports_left == 0
    for result in outcome.results:
        assert not result["sharing"]["gate_left"]
        assert result["sharing"]["restored"]
        assert not result["sharing"]["disabled"]


def test_every_iteration_shows_the_schedules_compute(outcome: Outcome) -> None:
    for events in outcome.events:
        whole = [event.iteration for event in events if event.kind in ("iteration", "control")]
        assert len(whole) >= 20
        for iteration in whole:
            kinds = Counter(event.kind for event in events if event.iteration == iteration)
            assert (kinds["forward"], kinds["backward"]) == (MICROBATCHES, MICROBATCHES)
            assert kinds["step"] >= 1


def test_the_gate_is_never_open_while_the_host_computes(outcome: Outcome) -> None:
    for events in outcome.events:
        opened_ns, num_opened = None, 0
        compute = sorted(event.t_ns for event in events if event.kind in ("forward", "backward", "step"))
        for event in events:
            if event.kind == "open":
                opened_ns, num_opened = event.t_ns, num_opened + 1
            elif event.kind == "close" and opened_ns is not None:
                assert not [begin for begin in compute if opened_ns < begin < event.t_ns]
                opened_ns = None
        assert num_opened > 0


def test_both_ranks_hold_back_the_same_control_iterations(outcome: Outcome) -> None:
    control = [{event.iteration for event in events if event.kind == "control"} for events in outcome.events]
    shared = [{event.iteration for event in events if event.kind == "iteration"} for events in outcome.events]
    assert control[0] == control[1] != set()
    assert shared[0] == shared[1] != set()
    for rank, events in enumerate(outcome.events):
        opened = {event.iteration for event in events if event.kind == "open"}
        assert opened
        assert not opened & control[rank]


def test_settings_that_cannot_work_are_refused_before_anything_is_touched() -> None:
    with pytest.raises(ConfigError, match="control_share must lie between 0 and 1"):
        share_bubbles(object(), control_share=1.5)
    with pytest.raises(ConfigError, match="window"):
        share_bubbles(object(), window=1)


def test_something_that_is_no_engine_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    attachment = share_bubbles(object())
    assert attachment.reporter is None
    assert "bubbles are not shared, training goes on" in caplog.text
    attachment.set_mode("open")
    attachment.close()
