"""Bubbles from schedules agree with the closed formulas of their authors."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydro_sim.bubbles import stage_offers
from hydro_sim.pipeline import SCHEDULES, PipelineSpec, lay_out
from hydro_sim.settings import BubbleConfig, HostConfig
from hydro_slurm.clock import ManualClock
from hydro_slurm.errors import ConfigError, TraceError
from hydro_slurm.timeline import TimelineWriter


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("p", "m"), [(1, 4), (2, 4), (4, 8), (4, 32), (8, 16), (16, 16)])
def test_bubble_ratio_is_p_minus_1_over_m_plus_p_minus_1(schedule: str, p: int, m: int) -> None:
    iteration = lay_out(PipelineSpec(num_stages=p, num_microbatches=m, schedule=schedule))
    assert iteration.bubble_ratio == pytest.approx((p - 1) / (m + p - 1))
    assert iteration.duration_s == pytest.approx((m + p - 1) * 3.0)


@pytest.mark.parametrize(("p", "m", "v"), [(2, 4, 2), (4, 8, 2), (4, 16, 4), (8, 16, 2)])
def test_interleaving_divides_the_bubble_by_the_chunks(p: int, m: int, v: int) -> None:
    spec = PipelineSpec(num_stages=p, num_microbatches=m, schedule="interleaved", num_chunks=v)
    assert lay_out(spec).bubble_ratio == pytest.approx((p - 1) / (v * m + p - 1))


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (8, 16)])
def test_zero_bubble_leaves_what_its_first_schedule_leaves(p: int, m: int) -> None:
    """H1: (p - 1)(F + B - W) idle time on each stage, with the memory of 1F1B."""
    spec = PipelineSpec(num_stages=p, num_microbatches=m, schedule="zero-bubble", forward_s=1.0, backward_s=2.0)
    for stage in lay_out(spec).stages:
        assert sum(stage.gaps_s) == pytest.approx((p - 1) * (1.0 + 1.0 - 1.0))
        assert stage.num_in_flight <= p


def test_memory_follows_the_schedule() -> None:
    held = {
        name: [s.num_in_flight for s in lay_out(PipelineSpec(num_stages=4, num_microbatches=8, schedule=name)).stages]
        for name in ("1f1b", "gpipe")
    }
    assert held == {"1f1b": [4, 3, 2, 1], "gpipe": [8, 8, 8, 8]}


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.sampled_from(SCHEDULES),
    p=st.integers(1, 6),
    rounds=st.integers(1, 4),
    forward=st.floats(0.1, 3),
    backward=st.floats(0.1, 3),
)
def test_every_stage_does_all_its_work(schedule: str, p: int, rounds: int, forward: float, backward: float) -> None:
    spec = PipelineSpec(
        num_stages=p, num_microbatches=p * rounds, schedule=schedule, forward_s=forward, backward_s=backward, step_s=0.5
    )
    iteration = lay_out(spec)
    for stage in iteration.stages:
        busy_s = iteration.duration_s - 0.5 - sum(stage.gaps_s)
        assert busy_s == pytest.approx(p * rounds * (forward + backward))
        assert all(gap > 0 for gap in stage.gaps_s)


def test_short_gaps_and_margins_are_not_counted_as_usable() -> None:
    pipeline = PipelineSpec(num_stages=2, num_microbatches=2, forward_s=0.001, backward_s=0.002)
    host = HostConfig(devices=2, pipeline=pipeline)
    assert stage_offers(host, BubbleConfig(), Path())[0].throughput_share == 0.0
    slow = HostConfig(devices=2, pipeline=PipelineSpec(num_stages=2, num_microbatches=2, forward_s=0.1, backward_s=0.2))
    config = BubbleConfig(margin_ms=10.0, efficiency=0.5)
    first = stage_offers(slow, config, Path())[0]
    assert first.idle_share == pytest.approx(1 / 3)
    iteration = lay_out(slow.pipeline)
    usable = sum(gap - 0.01 for gap in iteration.stages[0].gaps_s) / iteration.duration_s
    assert first.usable_s_per_s == pytest.approx(usable)
    assert first.throughput_share == pytest.approx(usable / 2)


def test_bubbles_are_taken_from_recorded_timelines(tmp_path: Path) -> None:
    clock = ManualClock()
    for stage in range(2):
        writer = TimelineWriter(tmp_path / f"{stage}.jsonl", "n1", 7, stage, clock=clock)
        for iteration in range(3):
            begin = iteration * 1_000_000_000
            writer.add("forward", begin, 600_000_000, stage=stage, iteration=iteration)
            writer.add("gap", begin + 600_000_000, 300_000_000, stage=stage, iteration=iteration)
            writer.add("backward", begin + 900_000_000, 100_000_000, stage=stage, iteration=iteration)
        writer.flush()
    host = HostConfig(devices=2, timelines=("0.jsonl", "1.jsonl"))
    offers = stage_offers(host, BubbleConfig(margin_ms=0.0, efficiency=1.0), tmp_path)
    assert [offer.throughput_share for offer in offers] == pytest.approx([0.3, 0.3])
    with pytest.raises(TraceError, match="cannot take bubbles from a timeline"):
        stage_offers(HostConfig(devices=1, timelines=("none.jsonl",)), BubbleConfig(), tmp_path)


def test_impossible_pipelines_are_refused() -> None:
    with pytest.raises(ConfigError, match="schedule must be one of"):
        PipelineSpec(num_stages=2, num_microbatches=2, schedule="2f2b")
    with pytest.raises(ConfigError, match="needs a multiple of 4 microbatches"):
        PipelineSpec(num_stages=4, num_microbatches=6, schedule="interleaved")
    with pytest.raises(ConfigError, match="30 devices do not divide into 4 stages"):
        HostConfig(devices=30)
