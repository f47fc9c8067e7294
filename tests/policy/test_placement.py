"""Placement is a pure function: what it must never do, and what it should prefer."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydro_slurm.errors import ConfigError
from hydro_slurm.policy import Demand, Launch, Refill, RunningBundle, SizingPolicy, Slot, max_fusion_count, place


def demand(num_waiting: int, max_lanes: int = 8, purpose: str = "search") -> Demand:
    return Demand(purpose=purpose, num_waiting=num_waiting, sizing=SizingPolicy(max_lanes=max_lanes))


def bundle(name: str, slot: str, num_lanes: int, max_lanes: int = 8, **more: object) -> RunningBundle:
    return RunningBundle(id=name, slot_id=slot, purpose="search", num_lanes=num_lanes, max_lanes=max_lanes, **more)


def test_waiting_trials_are_spread_over_free_slots() -> None:
    plan = place([demand(8)], [Slot(id="a"), Slot(id="b")], [])
    assert plan.launches == (Launch("a", "search", 4), Launch("b", "search", 4))


def test_slot_with_most_bubble_time_comes_first() -> None:
    plan = place([demand(1)], [Slot(id="a", bubble_s_per_s=0.1), Slot(id="b", bubble_s_per_s=0.3)], [])
    assert plan.launches == (Launch("b", "search", 1),)


def test_running_bundle_is_refilled_up_to_its_max_fusion_count() -> None:
    plan = place([demand(20)], [Slot(id="a")], [bundle("b1", "a", 5)])
    assert plan.refills == (Refill("b1", 3),)
    assert not plan.launches


def test_nothing_is_placed_on_a_shut_slot_and_what_runs_there_leaves() -> None:
    slots = [Slot(id="a", shut=True), Slot(id="b", shut=True)]
    plan = place([demand(5)], slots, [bundle("b1", "a", 2)])
    assert not plan.launches
    assert not plan.refills
    assert [finish.bundle_id for finish in plan.finishes] == ["b1"]


def test_a_finishing_bundle_gets_nothing_more() -> None:
    assert not place([demand(5)], [Slot(id="a")], [bundle("b1", "a", 2, finishing=True)])


def test_a_slot_that_is_being_left_keeps_its_share() -> None:
    leaving = bundle("b1", "a", 0, finishing=True)
    plan = place([demand(3)], [Slot(id="a"), Slot(id="b")], [leaving])
    assert plan.launches == (Launch("b", "search", 2),)
    assert not place([demand(1)], [Slot(id="a"), Slot(id="b")], [leaving, bundle("b2", "b", 2)])
    plan = place([demand(1)], [Slot(id="a"), Slot(id="b")], [bundle("b2", "b", 2)])
    assert plan.launches == (Launch("a", "search", 1),)


def test_demands_are_served_in_order() -> None:
    plan = place([demand(8, purpose="verify"), demand(8)], [Slot(id="a")], [])
    assert [launch.purpose for launch in plan.launches] == ["verify"]


def test_memory_limits_the_fusion_count() -> None:
    sizing = SizingPolicy(max_lanes=64, lane_bytes=100, memory_share=0.5)
    assert max_fusion_count(1000, sizing) == 5
    assert max_fusion_count(100, sizing) == 0
    assert max_fusion_count(0, sizing) == 64  # memory unknown


def test_bad_limits_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_lanes must be at least 1, got 0"):
        SizingPolicy(max_lanes=0)
    with pytest.raises(ConfigError, match="memory_share"):
        SizingPolicy(max_lanes=1, memory_share=0.0)


slot_lists = st.lists(
    st.builds(
        Slot,
        id=st.sampled_from([f"s{i}" for i in range(8)]),
        bubble_s_per_s=st.floats(0.01, 1),
        shut=st.booleans(),
    ),
    unique_by=lambda slot: slot.id,
    max_size=8,
)


@given(slots=slot_lists, num_waiting=st.integers(0, 100), max_lanes=st.integers(1, 16), data=st.data())
def test_a_plan_never_oversteps(slots: list[Slot], num_waiting: int, max_lanes: int, data: st.DataObject) -> None:
    taken = data.draw(st.lists(st.sampled_from(slots), unique_by=lambda slot: slot.id)) if slots else []
    running = [
        bundle(f"b{i}", slot.id, data.draw(st.integers(0, max_lanes)), max_lanes) for i, slot in enumerate(taken)
    ]
    plan = place([demand(num_waiting, max_lanes)], slots, running)
    assert plan == place([demand(num_waiting, max_lanes)], list(reversed(slots)), list(reversed(running)))
    placed = sum(launch.num_lanes for launch in plan.launches) + sum(refill.num_lanes for refill in plan.refills)
    assert placed <= num_waiting
    assert all(0 < launch.num_lanes <= max_lanes for launch in plan.launches)
    by_id = {slot.id: slot for slot in slots}
    holders = Counter([launch.slot_id for launch in plan.launches] + [b.slot_id for b in running])
    assert all(count == 1 for count in holders.values())
    assert not any(by_id[launch.slot_id].shut for launch in plan.launches)
    lanes = {b.id: b.num_lanes for b in running}
    assert all(lanes[refill.bundle_id] + refill.num_lanes <= max_lanes for refill in plan.refills)
    open_places = sum(not slot.shut and slot.id not in {b.slot_id for b in running} for slot in slots)
    assert placed > 0 or num_waiting == 0 or open_places == 0
