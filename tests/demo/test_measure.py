"""The measurement finds what was put into a synthetic run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hydro_slurm.demo.measure import (
    bubble_ratio,
    bubble_used,
    busy_blocks,
    covered_ns,
    exclusive_throughput_share,
    intersect,
    lane_steps_in,
    read_rank,
    slowdown,
)
from hydro_slurm.errors import FormatError
from hydro_slurm.timeline import TimelineWriter

MS = 1_000_000
GAP_MS = 20


def intervals(*pairs: tuple[int, int]) -> np.ndarray:
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


class Recorder:
    """Writes the records of one slot: iterations of 100 ms with one bubble of 20 ms."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.host = TimelineWriter(folder / "host.jsonl", "n1", 1, 0)
        self.bundle = TimelineWriter(folder / "bundle.jsonl", "n1", 1, 0)
        self.lines: list[str] = []
        self.now_ns = 10_000 * MS
        self.noise = np.random.default_rng(seed)

    def block(self, arm: str, number: int, *, factor: float, used_ms: int, with_bundle: bool = True) -> None:
        start_ns, iterations = self.now_ns, []
        for _ in range(6):
            dur_ns = int((100 * factor + self.noise.normal(0, 0.5)) * MS)
            iterations.append({"iteration": 0, "start_ns": self.now_ns, "dur_ns": dur_ns})
            self.host.add("gap", self.now_ns + 10 * MS, GAP_MS * MS)
            if used_ms and with_bundle:
                run_ms = used_ms if arm == "bubbles" else 90
                self.bundle.add("quantum", self.now_ns + 10 * MS, run_ms * MS, lanes=4, num_steps=run_ms)
            self.now_ns += dur_ns
        self._close(arm, number, start_ns, iterations)

    def exclusive(self, number: int, *, lanes: int = 4) -> None:
        start_ns = self.now_ns
        self.bundle.add("quantum", start_ns, 1000 * MS, lanes=lanes, num_steps=1000)
        self.now_ns += 1000 * MS
        self._close("exclusive", number, start_ns, [])

    def _close(self, arm: str, number: int, start_ns: int, iterations: list[dict[str, int]]) -> None:
        block = {"arm": arm, "round": number, "start_ns": start_ns, "end_ns": self.now_ns, "iterations": iterations}
        self.lines.append(json.dumps(block) + "\n")

    def finish(self) -> None:
        self.host.flush()
        self.bundle.flush()
        (self.folder / "blocks.jsonl").write_text("".join(self.lines))


def record(folder: Path, *, rounds: int = 12, shared_factor: float = 1.0, idle_round: int | None = None):
    folder.mkdir()
    recorder = Recorder(folder, seed=3)
    for number in range(rounds):
        recorder.block("alone", number, factor=1.0, used_ms=0)
        recorder.block("bubbles", number, factor=shared_factor, used_ms=15, with_bundle=number != idle_round)
        recorder.block("colocated", number, factor=1.9, used_ms=90)
        recorder.exclusive(number)
    recorder.finish()
    return read_rank(folder / "blocks.jsonl", folder / "host.jsonl", [folder / "bundle.jsonl"])


def test_intervals() -> None:
    left, right = intervals((0, 10), (20, 30)), intervals((5, 25), (28, 40))
    assert intersect(left, right).tolist() == [[5, 10], [20, 25], [28, 30]]
    assert covered_ns(left, 5, 22) == 7
    assert covered_ns(intervals(), 0, 10) == 0


def test_no_slowdown_is_found_where_there_is_none(tmp_path: Path) -> None:
    records = [record(tmp_path / "a"), record(tmp_path / "b")]
    found = slowdown(records, "bubbles")
    assert abs(found.value) < 0.005
    assert found.ci95[0] <= found.value <= found.ci95[1]
    assert found.ci95[1] < 0.01


def test_a_slowdown_is_found_where_there_is_one(tmp_path: Path) -> None:
    records = [record(tmp_path / "a", shared_factor=1.05)]
    found = slowdown(records, "bubbles")
    assert found.ci95[0] < 0.05 < found.ci95[1] or abs(found.value - 0.05) < 0.005
    assert slowdown(records, "colocated").value == pytest.approx(0.9, abs=0.02)


def test_shares_of_bubbles_and_throughput(tmp_path: Path) -> None:
    records = [record(tmp_path / "a")]
    assert bubble_ratio(records) == pytest.approx(0.2, abs=0.005)
    assert bubble_used(records) == pytest.approx(15 / 20, abs=0.005)
    assert exclusive_throughput_share(records) == pytest.approx(0.15, abs=0.005)


def test_blocks_without_a_busy_bundle_do_not_count(tmp_path: Path) -> None:
    records = [record(tmp_path / "a", idle_round=5)]
    rounds = {records[0].blocks[position].round for position in busy_blocks(records, "bubbles")}
    assert rounds == set(range(12)) - {5}
    assert bubble_used(records) == pytest.approx(15 / 20, abs=0.005)


def test_a_run_over_an_edge_counts_by_its_part(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    recorder = Recorder(folder, seed=0)
    recorder.exclusive(0)
    recorder.finish()
    rank = read_rank(folder / "blocks.jsonl", folder / "host.jsonl", [folder / "bundle.jsonl"])
    start_ns = rank.blocks[0].start_ns
    assert lane_steps_in(rank, start_ns, start_ns + 250 * MS) == pytest.approx(1000)


def test_too_few_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="only 2 blocks"):
        slowdown([record(tmp_path / "a", rounds=2)], "bubbles")


def test_a_damaged_block_is_refused(tmp_path: Path) -> None:
    record(tmp_path / "a")
    path = tmp_path / "a" / "blocks.jsonl"
    path.write_text('{"arm": "alone"}\n')
    with pytest.raises(FormatError, match="line 1: not a block"):
        read_rank(path, tmp_path / "a" / "host.jsonl", [])
