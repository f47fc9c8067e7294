"""What the side threads leave in the report directory, and that no directory can disturb the host."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hydro_slurm.clock import ManualClock
from hydro_slurm.formats import read_record
from hydro_slurm.hooks.reporter import BubbleReporter
from hydro_slurm.hooks.slot_reports import SlotIdentity, SlotReports, free_memory_bytes
from hydro_slurm.model import Device, SlotReport
from hydro_slurm.timeline import TimelineWriter

IDENTITY = SlotIdentity("n1", 41, 0, 2, 1, 2, Device("cpu", 0, (1,)), Path("/gone/n1/41/0"))


def eventually(condition: Callable[[], bool], timeout_s: float = 10) -> bool:
    end_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.01)
    return True


def trained(publisher, num_iterations: int) -> BubbleReporter:  # type: ignore[no-untyped-def]
    clock = ManualClock()
    reporter = BubbleReporter(publisher, clock=clock, control_share=0.1, secret=b"s")
    reporter.set_schedule("1f1b")
    for _ in range(num_iterations):
        for compute_ms, gap_ms in ((10, 20), (20, 1)):
            reporter.compute_begin("forward")
            clock.advance(compute_ms / 1000)
            reporter.compute_end()
            clock.advance(gap_ms / 1000)
        reporter.compute_begin("step")
        reporter.step_end()
    return reporter


def test_the_report_says_what_was_learned(publisher, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    reporter = trained(publisher, 20)
    reports = SlotReports(reporter, IDENTITY, tmp_path / "slots", read_free_bytes=lambda: 5 << 30)
    reports.write()
    report = read_record(SlotReport, tmp_path / "slots" / "41.n1.0.json")
    assert (report.node, report.job_id, report.local_rank, report.stage, report.num_stages) == ("n1", 41, 0, 1, 2)
    assert report.device == Device("cpu", 0, (1,))
    assert report.iteration_s == pytest.approx(0.051)
    assert report.bubble_s_per_s == pytest.approx(20 / 51 * 0.9)
    assert report.gap_quantiles_ms == {"p10": 20, "p25": 20, "p50": 20, "p75": 20, "p90": 20}
    assert (report.free_bytes, report.guard.state, report.iteration) == (5 << 30, "open", 20)


def test_while_learning_the_report_promises_nothing(publisher, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    report = SlotReports(trained(publisher, 3), IDENTITY, tmp_path).report()
    assert (report.guard.state, report.iteration_s, report.bubble_s_per_s) == ("learning", None, 0.0)
    assert report.gap_quantiles_ms == {}


def test_a_shut_or_disabled_slot_promises_nothing(publisher, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    reporter = trained(publisher, 20)
    reports = SlotReports(reporter, IDENTITY, tmp_path)
    reporter.guard.shut = True
    assert (reports.report().guard.state, reports.report().bubble_s_per_s) == ("shut", 0.0)
    reporter.guard.shut = False
    reporter.leave()
    assert reports.report().bubble_s_per_s == 0.0


def test_threads_report_at_once_beat_flush_and_tidy_up(publisher, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    timeline = TimelineWriter(tmp_path / "t.jsonl", "n1", 41, 0)
    reporter = trained(publisher, 3)
    reports = SlotReports(reporter, IDENTITY, tmp_path / "slots", timeline=timeline, heartbeat_s=0.01)
    reports.start()
    path = tmp_path / "slots" / "41.n1.0.json"
    try:
        assert eventually(path.exists)
        assert eventually(lambda: publisher.num_heartbeats > 3)
        reporter.iteration = 77
        reports.wake()
        assert eventually(lambda: read_record(SlotReport, path).iteration == 77)
        timeline.add("gap", 5, 6)
    finally:
        reports.stop()
    assert not path.exists()
    assert '"kind": "gap"' in (tmp_path / "t.jsonl").read_text()
    num_beats = publisher.num_heartbeats
    assert not eventually(lambda: publisher.num_heartbeats > num_beats, timeout_s=0.1)


def test_a_report_directory_that_cannot_be_written_is_one_line_in_the_log(
    publisher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "slots").write_text("a file where the directory should be")
    reporter = trained(publisher, 10)
    reports = SlotReports(reporter, IDENTITY, tmp_path / "slots", report_s=0.01, heartbeat_s=0.01)
    with caplog.at_level(logging.WARNING):
        reports.start()
        assert eventually(lambda: bool(caplog.records))
        assert eventually(lambda: publisher.num_heartbeats > 3), "the heartbeat goes on"
        (tmp_path / "slots").unlink()
        assert eventually((tmp_path / "slots" / "41.n1.0.json").exists), "it recovers when the directory does"
        reports.stop()
    assert len(caplog.records) == 1
    assert "training is not affected" in caplog.text
    assert not reporter.disabled


def test_free_memory_is_some_but_not_more_than_the_machine_has() -> None:
    total = next(
        int(line.split()[1]) << 10 for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line
    )
    assert 0 < free_memory_bytes() <= total
