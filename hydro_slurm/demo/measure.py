"""What a run with interleaved arms shows: the host's slowdown, the use of its bubbles, the bundles' throughput.

The host trains in blocks of iterations; each round holds one block (or more) of every arm in random order: `alone`
(gates closed), `bubbles` (normal sharing), `colocated` (gates held open: what sharing without a gate does), and
`exclusive` (the host waits, the bundles have the devices to themselves). Host and bundles record timelines on the same
monotonic clock of their node. Nothing here knows where the records come from: a demo, a benchmark, a cluster.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hydro_slurm.errors import FormatError
from hydro_slurm.timeline import TimelineEvent, read_timeline

Intervals = NDArray[np.int64]
"""Ascending, disjoint intervals in ns, shape (number, 2): start and end."""

MIN_BUBBLE_NS = 3_000_000
"""Shorter gaps are not counted as bubbles: nothing useful fits."""

NUM_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Block:
    """A run of iterations of one arm on one rank.

    Iterations are (start_ns, dur_ns). Left out are the first, in which the arm before still echoes, and those in
    which the host's own guard kept the gates closed as its control.
    """

    arm: str
    round: int
    start_ns: int
    end_ns: int
    iterations: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % confidence interval and the number of observations behind it."""

    value: float
    ci95: tuple[float, float]
    n: int


@dataclass(frozen=True, slots=True)
class RankRecord:
    """Everything recorded on one slot: the host rank's blocks and gaps, and the runs of the bundles there."""

    blocks: tuple[Block, ...]
    gaps: Intervals
    """Bubbles of the host rank."""
    runs: Intervals
    """When a bundle computed."""
    lane_steps: NDArray[np.float64]
    """Lane steps (optimizer steps times lanes) finished in each run, shape (number,)."""


def read_blocks(path: Path) -> tuple[Block, ...]:
    """Read a rank's `blocks.RANK.jsonl`.

    Raises:
        FormatError: A line is not a block. A last line without its newline is left out.
    """
    blocks = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            found = json.loads(line)
            settled = [i for i in found["iterations"][1:] if not i.get("control", False)]
            iterations = tuple((int(i["start_ns"]), int(i["dur_ns"])) for i in settled)
            blocks.append(
                Block(found["arm"], int(found["round"]), int(found["start_ns"]), int(found["end_ns"]), iterations)
            )
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{path}: line {number}: not a block of iterations ({error!r})") from None
    return tuple(blocks)


def read_rank(blocks: Path, host_timeline: Path, bundle_timelines: Sequence[Path]) -> RankRecord:
    """Put together what was recorded on one slot."""
    _, host_events = read_timeline(host_timeline)
    gaps = sorted((e.t_ns, e.end_ns) for e in host_events if e.kind == "gap" and e.dur_ns >= MIN_BUBBLE_NS)
    runs: list[TimelineEvent] = []
    for path in bundle_timelines:
        runs += [event for event in read_timeline(path)[1] if event.kind == "quantum"]
    runs.sort(key=lambda event: event.t_ns)
    return RankRecord(
        blocks=read_blocks(blocks),
        gaps=np.array(gaps, dtype=np.int64).reshape(-1, 2),
        runs=np.array([(run.t_ns, run.end_ns) for run in runs], dtype=np.int64).reshape(-1, 2),
        lane_steps=np.array([(run.num_steps or 0) * (run.lanes or 0) for run in runs], dtype=np.float64),
    )


def covered_ns(intervals: Intervals, start_ns: int, end_ns: int) -> int:
    """Length of the part of [start, end) that the intervals cover."""
    if len(intervals) == 0:
        return 0
    clipped = np.clip(intervals, start_ns, end_ns)
    return int(np.sum(clipped[:, 1] - clipped[:, 0]))


def intersect(left: Intervals, right: Intervals) -> Intervals:
    """What both lists of intervals cover."""
    found = []
    i = j = 0
    while i < len(left) and j < len(right):
        start, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < end:
            found.append((start, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def busy_blocks(records: Sequence[RankRecord], arm: str) -> list[int]:
    """Positions of an arm's blocks in which every slot had a bundle with work.

    A slot counts if its bundle computed in at least two thirds of the block's iterations, or for a third of the block
    itself where nothing holds it back to bubbles: a bundle that is starting, or has run out of trials, says nothing
    about sharing. (A recorded run is as long as its computing time, so one that shared its core ends early.)
    """
    chosen = []
    for position, block in enumerate(records[0].blocks):
        if block.arm == arm and all(_is_busy(record, record.blocks[position]) for record in records):
            chosen.append(position)
    return chosen


def _is_busy(record: RankRecord, block: Block) -> bool:
    if block.arm != "bubbles":
        return covered_ns(record.runs, block.start_ns, block.end_ns) * 3 >= block.end_ns - block.start_ns
    num_busy = sum(covered_ns(record.runs, start, start + dur) > 0 for start, dur in block.iterations)
    return num_busy * 3 >= len(block.iterations) * 2


def iteration_ms(records: Sequence[RankRecord], arm: str, positions: Sequence[int]) -> float:
    """Median iteration time of an arm's blocks, in ms."""
    durations = [dur for position in positions for _, dur in records[0].blocks[position].iterations]
    return float(np.median(durations)) / 1e6 if durations else float("nan")


def slowdown(records: Sequence[RankRecord], arm: str, *, seed: int = 0) -> Estimate:
    """How much longer the host's iteration takes in an arm than alone, as a fraction (0.01 = 1 %).

    Each block of the arm is compared with the nearest block alone, median iteration with median iteration, because
    the machine drifts and is disturbed for seconds at a time. The figure is the Hodges-Lehmann estimate over these
    pairs (the median of all pairs' averages, on the logarithm); its interval comes from resampling the pairs.

    Raises:
        FormatError: Fewer than three pairs.
    """
    blocks = records[0].blocks
    alone = [block for block in blocks if block.arm == "alone" and block.iterations]
    shared = [blocks[position] for position in busy_blocks(records, arm) if blocks[position].iterations]
    if len(shared) < 3 or not alone:
        raise FormatError(
            f"only {len(shared)} blocks of the arm {arm!r} had busy bundles, needed 3; let the host train longer, or "
            "the study run more trials"
        )
    pairs = [(block, min(alone, key=lambda other: abs(_middle_ns(other) - _middle_ns(block)))) for block in shared]
    logs = np.array([np.log(_median_ns(block) / _median_ns(base)) for block, base in pairs])
    low, high = _bootstrap(logs, seed)
    num_iterations = sum(len(block.iterations) for block in shared)
    return Estimate(float(np.expm1(_hodges_lehmann(logs))), (low, high), num_iterations)


def _middle_ns(block: Block) -> int:
    return (block.start_ns + block.end_ns) // 2


def _median_ns(block: Block) -> float:
    return float(np.median([dur for _, dur in block.iterations]))


def _hodges_lehmann(values: NDArray[np.float64]) -> float:
    first, second = np.triu_indices(len(values))
    return float(np.median((values[first] + values[second]) / 2))


def _bootstrap(values: NDArray[np.float64], seed: int) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    chosen = generator.integers(0, len(values), (NUM_RESAMPLES, len(values)))
    low, high = np.percentile([_hodges_lehmann(values[row]) for row in chosen], [2.5, 97.5])
    return float(np.expm1(low)), float(np.expm1(high))


def bubble_ratio(records: Sequence[RankRecord]) -> float:
    """Part of the host's time alone that is bubble, averaged over its slots."""
    shares = []
    for record in records:
        spans = [span for block in record.blocks if block.arm == "alone" for span in block.iterations]
        bubble_ns = sum(covered_ns(record.gaps, start, start + dur) for start, dur in spans)
        shares.append(bubble_ns / max(sum(dur for _, dur in spans), 1))
    return float(np.mean(shares))


def bubble_used(records: Sequence[RankRecord]) -> float:
    """Bundles' computing time inside bubbles, relative to the bubble time of the iterations alone.

    Both per iteration, averaged over the slots; bubbles shorter than 3 ms do not count.
    """
    positions = busy_blocks(records, "bubbles")
    shares = []
    for record in records:
        alone = [span for block in record.blocks if block.arm == "alone" for span in block.iterations]
        shared = [span for position in positions for span in record.blocks[position].iterations]
        if not alone or not shared:
            raise FormatError("no iterations alone, or none in bubbles with busy bundles, were recorded")
        inside = intersect(record.runs, record.gaps)
        used_ns = sum(covered_ns(inside, start, start + dur) for start, dur in shared) / len(shared)
        bubble_ns = sum(covered_ns(record.gaps, start, start + dur) for start, dur in alone) / len(alone)
        shares.append(used_ns / bubble_ns)
    return float(np.mean(shares))


def lane_steps_in(record: RankRecord, start_ns: int, end_ns: int) -> float:
    """Lane steps finished in an interval; runs that reach over its edge count by their part."""
    if len(record.runs) == 0:
        return 0.0
    clipped = np.clip(record.runs, start_ns, end_ns)
    inside = (clipped[:, 1] - clipped[:, 0]) / np.maximum(record.runs[:, 1] - record.runs[:, 0], 1)
    return float(np.sum(inside * record.lane_steps))


def exclusive_throughput_share(records: Sequence[RankRecord]) -> float:
    """Lane steps per second of bundles in bubbles, relative to the same bundles alone on the devices."""
    rates = {arm: _lane_steps_per_s(records, arm) for arm in ("bubbles", "exclusive")}
    return rates["bubbles"] / rates["exclusive"]


def _lane_steps_per_s(records: Sequence[RankRecord], arm: str) -> float:
    steps = seconds = 0.0
    positions = busy_blocks(records, arm)
    for record in records:
        for block in (record.blocks[position] for position in positions):
            steps += lane_steps_in(record, block.start_ns, block.end_ns)
            seconds += (block.end_ns - block.start_ns) / 1e9
    if not seconds or not steps:
        raise FormatError(f"no block of the arm {arm!r} had busy bundles; let the study run more trials")
    return steps / seconds
