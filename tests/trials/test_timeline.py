"""Recorded timelines: what is written is read back, and nothing else is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydro_slurm.clock import ManualClock
from hydro_slurm.errors import FormatError
from hydro_slurm.timeline import MAX_LINE_BYTES, TimelineEvent, TimelineWriter, read_timeline


def test_events_come_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    writer = TimelineWriter(path, "n1", 41, 0, clock=ManualClock(5_000, 12.5))
    writer.add("forward", 10, 5, stage=1, iteration=3, microbatch=2)
    writer.add("quantum", 20, 7, lanes=8, num_steps=3, num_quanta=12)
    assert writer.flush() == 2
    writer.add("close", 30)
    assert writer.flush() == 1 and writer.flush() == 0
    header, events = read_timeline(path)
    assert (header.node, header.job_id, header.rank) == ("n1", 41, 0)
    assert (header.anchor_monotonic_ns, header.anchor_wall_s) == (5_000, 12.5)
    assert events == [
        TimelineEvent(10, 5, "forward", stage=1, iteration=3, microbatch=2),
        TimelineEvent(20, 7, "quantum", lanes=8, num_steps=3, num_quanta=12),
        TimelineEvent(30, 0, "close"),
    ]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    writer = TimelineWriter(path, "n1", 41, 0)
    writer.add("gap", 1, 2)
    writer.flush()
    with path.open("a") as file:
        file.write('{"t_ns": 5, "dur')
    assert [event.t_ns for event in read_timeline(path)[1]] == [1]


def test_a_writer_keeps_no_more_than_its_bound(tmp_path: Path) -> None:
    writer = TimelineWriter(tmp_path / "a.jsonl", "n1", 41, 0, max_events=2)
    for t_ns in range(5):
        writer.add("open", t_ns)
    assert writer.flush() == 2 and writer.num_dropped == 3


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"t_ns": 1, "dur_ns": 2, "kind": "nap"}', "nap"),
        ('{"t_ns": "1", "dur_ns": 2, "kind": "gap"}', "t_ns"),
        ('{"t_ns": 1, "dur_ns": -2, "kind": "gap"}', "dur_ns"),
        ('{"t_ns": 1, "dur_ns": 2, "kind": "gap", "stage": true}', "stage"),
        ("[1]", "list"),
        ("nonsense", "JSON"),
        (" " * (MAX_LINE_BYTES + 10), "bytes"),
    ],
)
def test_a_line_that_is_no_event_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "a.jsonl"
    TimelineWriter(path, "n1", 41, 0)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(FormatError, match=complaint):
        read_timeline(path)


@pytest.mark.parametrize("text", ["", "{}\n", '{"format": "hydro.timeline", "version": 2}\n', '{"format": "hydro.time'])
def test_a_file_that_is_no_timeline_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(FormatError, match=r"a\.jsonl"):
        read_timeline(path)
