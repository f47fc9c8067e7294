"""Several users, promoted trials, elastic moves, hosts that leave: what the policy prefers."""

from __future__ import annotations

import pytest

from hydro_slurm.errors import ConfigError
from hydro_slurm.policy import (
    Candidate,
    Claim,
    Decider,
    Demand,
    Finish,
    HostOffer,
    HostPolicy,
    Launch,
    MovePolicy,
    RunningBundle,
    SizingPolicy,
    Slot,
    SlotClass,
    Supersede,
    ThroughputCurve,
    TransferPolicy,
    UserShare,
    allocate,
    eager_transfer,
    place,
    why_not,
)


def demand(study: str, num_waiting: int, max_lanes: int = 4, **more: object) -> Demand:
    more = {"purpose": "search", "user": study, "sizing": SizingPolicy(max_lanes=max_lanes), **more}
    return Demand(study=study, num_waiting=num_waiting, **more)


def bundle(name: str, slot: str, study: str, num_lanes: int, **more: object) -> RunningBundle:
    more = {"purpose": "search", "max_lanes": 4, "user": study, **more}
    return RunningBundle(id=name, slot_id=slot, study=study, num_lanes=num_lanes, **more)


SLOTS = [Slot(id=f"s{i}") for i in range(4)]


def test_slots_are_shared_by_weight() -> None:
    plan = place([demand("a", 100), demand("b", 100)], SLOTS, [], {"a": UserShare(weight=3.0)})
    assert [launch.study for launch in plan.launches].count("a") == 3


def test_a_users_limit_holds_over_all_his_studies() -> None:
    demands = [demand("a", 100, user="ada"), demand("b", 100, user="ada")]
    plan = place(demands, SLOTS, [], {"ada": UserShare(max_slots=3)})
    assert len(plan.launches) == 3
    assert {launch.study for launch in plan.launches} == {"a", "b"}


def test_what_one_study_cannot_use_another_gets() -> None:
    plan = place([demand("a", 1), demand("b", 100)], SLOTS, [])
    assert sorted((launch.study, launch.num_lanes) for launch in plan.launches) == [("a", 1)] + [("b", 4)] * 3


def test_who_waits_gets_a_slot_of_who_has_more_than_a_fair_share() -> None:
    running = [bundle(f"b{i}", f"s{i}", "a", 4 - i % 2) for i in range(4)]
    plan = place([demand("a", 10), demand("b", 10)], SLOTS, running)
    assert plan.finishes == (Finish("b1", "its slot goes to b, which has less"),)
    assert not plan.refills or all(refill.bundle_id != "b1" for refill in plan.refills)


def test_promoted_trials_go_to_the_exclusive_device_and_early_ones_to_bubbles() -> None:
    slots = [Slot(id="own", kind="own"), Slot(id="hole", bubble_s_per_s=0.2)]
    demands = [demand("a", 4), demand("a", 1, purpose="verify", promoted=True)]
    assert place(demands, slots, []).launches == (Launch("own", "verify", 1, "a"), Launch("hole", "search", 4, "a"))
    running = [bundle("b", "own", "a", 4)]
    plan = place(demands, slots, running)
    assert plan.finishes == (Finish("b", "promoted trials need this exclusive device"),)
    assert [launch.purpose for launch in plan.launches] == ["search"]
    assert [launch.slot_id for launch in place(demands[1:], slots[1:], []).launches] == ["hole"]


def test_lanes_gather_where_a_profile_says_that_fusing_is_free() -> None:
    flat = SizingPolicy(max_lanes=16, curve=ThroughputCurve(((1, 1.0), (16, 16.0))))
    slots = [Slot(id="own", kind="own"), Slot(id="hole", bubble_s_per_s=0.2)]
    plan = place([demand("a", 10, sizing=flat)], slots, [])
    assert plan.launches == (Launch("own", "search", 10, "a"),)
    full = SizingPolicy(max_lanes=16, curve=ThroughputCurve(((1, 1.0), (16, 1.0))))
    plan = place([demand("a", 12, sizing=full)], slots, [])
    assert {launch.slot_id: launch.num_lanes for launch in plan.launches} == {"own": 1, "hole": 1}, "knee"


def test_idle_slots_are_given_to_what_still_runs() -> None:
    running = [bundle("b", "s0", "a", 4, remaining_s=1000.0)]
    plan = place([demand("a", 0)], SLOTS, running)
    assert plan.finishes == (Finish("b", "its lanes are spread over faster places"),)
    assert not place([demand("a", 0)], SLOTS, [bundle("b", "s0", "a", 4, remaining_s=30.0)]), "not worth a move"
    assert not place([demand("a", 0)], SLOTS, [bundle("b", "s0", "a", 4)]), "nobody knows"


def test_lanes_in_slow_bubbles_join_a_faster_bundle_with_room() -> None:
    curve = ThroughputCurve(((1, 1.0), (8, 6.0)))
    slots = [Slot(id="own", kind="own"), Slot(id="hole", bubble_s_per_s=0.1)]
    demands = [demand("a", 0, sizing=SizingPolicy(max_lanes=8, curve=curve))]
    running = [
        bundle("fast", "own", "a", 2, max_lanes=8, remaining_s=100.0),
        bundle("slow", "hole", "a", 1, max_lanes=8, remaining_s=900.0),
    ]
    assert [finish.bundle_id for finish in place(demands, slots, running).finishes] == ["slow"]
    running[0] = bundle("fast", "own", "a", 8, max_lanes=8, remaining_s=800.0)
    assert not place(demands, slots, running), "there is no room"


def test_a_bundle_that_no_longer_fits_leaves() -> None:
    plan = place([demand("a", 0)], SLOTS, [bundle("b", "s0", "a", 4, max_lanes=2)])
    assert plan.finishes == (Finish("b", "its slot has memory for 2 lanes only"),)


def test_a_departing_host_gets_only_what_ends_before() -> None:
    slots = [Slot(id="late", time_left_s=20.0, bubble_s_per_s=0.5)]
    assert not place([demand("a", 4, piece_s=15.0)], slots, [])
    assert place([demand("a", 4, piece_s=15.0), demand("b", 4, piece_s=9.0)], slots, []).launches == (
        Launch("late", "search", 4, "b"),
    )


def test_bundles_run_dry_for_who_holds_nothing_but_only_where_that_helps() -> None:
    slots = [Slot(id="mine", kind="own", study="a"), Slot(id="hole", bubble_s_per_s=0.5)]
    running = [bundle("b1", "mine", "a", 1), bundle("b2", "hole", "a", 1)]
    plan = place([demand("a", 6), demand("b", 6)], slots, running)
    assert {refill.bundle_id for refill in plan.refills} == {"b1"}
    plan = place([demand("a", 6)], slots, running)
    assert {refill.bundle_id for refill in plan.refills} == {"b1", "b2"}


def test_groups_never_share_a_bundle() -> None:
    demands = [demand("a", 3, group="128"), demand("a", 3, group="256")]
    plan = place(demands, SLOTS[:2], [bundle("b", "s0", "a", 1, group="128")])
    assert [refill.bundle_id for refill in plan.refills] == ["b"]
    assert [launch.group for launch in plan.launches] in (["256"], ["128"])
    assert sum(refill.num_lanes for refill in plan.refills) <= 3


def test_shares_over_device_types_follow_what_each_study_gains() -> None:
    classes = [SlotClass("own", "a100", 1.0, 4), SlotClass("own", "h100", 1.0, 4)]
    gains, even = Claim(1.0, 8.0, {"a100": 1.0, "h100": 4.0}), Claim(1.0, 8.0, {"a100": 1.0, "h100": 1.0})
    pytest.importorskip("scipy", reason="shares over several device types need SciPy's solver")
    first, second = allocate([gains, even], classes)
    assert first[1] > 2.5 > 1.0 > first[0], "who gains most from the fast type gets most of it"
    normalised = [first[0] + 4 * first[1], 5 / 2 * (second[0] + second[1])]
    assert normalised[0] == pytest.approx(normalised[1], rel=1e-3)
    assert normalised[0] > 10.0 + 0.5, "both are better off than with half of everything"
    for column in range(2):
        assert first[column] + second[column] <= 4 + 1e-6


def test_a_claim_at_its_limit_leaves_the_rest_to_others() -> None:
    classes = [SlotClass("own", "a100", 1.0, 4), SlotClass("own", "h100", 1.0, 4)]
    pytest.importorskip("scipy", reason="shares over several device types need SciPy's solver")
    first, second = allocate([Claim(1.0, 1.0, {"h100": 4.0}), Claim(1.0, 9.0, {"h100": 2.0})], classes)
    assert sum(first) == pytest.approx(1.0, abs=1e-3)
    assert sum(second) == pytest.approx(7.0, abs=1e-3)


def test_decisions_come_once_a_period_and_on_changed_input() -> None:
    decider = Decider(period_s=30.0)
    assert decider.decide(0.0, [demand("a", 4)], SLOTS, []).launches
    assert not decider.decide(10.0, [demand("a", 4)], SLOTS, [])
    assert decider.next_s(10.0) == 30.0
    running = [bundle("b", "s0", "a", 4)]
    for now_s in (30.0, 60.0, 90.0):
        assert not decider.decide(now_s, [demand("a", 0)], SLOTS, running)
    assert decider.num_decisions == 2
    assert decider.decide(120.0, [demand("a", 3)], SLOTS, running).launches


def test_eager_transfer_waits_for_half_of_the_trials_and_an_idle_device() -> None:
    policy, best = TransferPolicy(), Candidate(7, 0.2)
    assert eager_transfer(4, 10, best, None, 0.0, True, policy) is None
    assert eager_transfer(5, 10, best, None, 0.0, False, policy) is None
    assert eager_transfer(5, 10, best, None, 0.0, True, policy) == Supersede(7)
    assert eager_transfer(6, 10, Candidate(9, 0.1), best, 0.2, False, policy) == Supersede(9, stop=7)
    assert eager_transfer(6, 10, Candidate(9, 0.1), best, 0.8, False, policy) is None, "too far to be given up"
    assert eager_transfer(6, 10, best, best, 0.2, False, policy) is None


def test_hosts_qualify_by_offer_stages_age_and_time_left() -> None:
    def offer(**more: object) -> HostOffer:
        given = {"shares": True, "has_live_gates": True, "num_stages": 4, "age_s": 100.0, "time_left_s": None, **more}
        return HostOffer(**given)

    policy = HostPolicy()
    assert why_not(offer(), policy) == ""
    assert why_not(offer(shares=False), policy) == "it does not offer its bubbles"
    assert why_not(offer(has_live_gates=False), policy) == "it has no live gates"
    assert why_not(offer(num_stages=1), policy) == "it has 1 stages, needed 2"
    assert why_not(offer(age_s=3.0), policy) == "it has run for 3 s, needed 60 s"
    assert why_not(offer(time_left_s=10.0), policy) == "its time limit is 10 s away, needed 300 s"


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="weight must be positive, got 0"):
        UserShare(weight=0.0)
    with pytest.raises(ConfigError, match="rising fusion counts"):
        ThroughputCurve(((4, 1.0), (2, 1.0)))
    with pytest.raises(ConfigError, match=r"min_share_done must lie in \[0, 1\], got 2"):
        TransferPolicy(min_share_done=2)
    with pytest.raises(ConfigError, match="moves"):
        MovePolicy(cost_s=-1)


def test_a_curve_knows_its_knee() -> None:
    curve = ThroughputCurve(((1, 10.0), (8, 60.0), (32, 99.0), (64, 100.0)))
    assert curve.knee() == 32
    assert curve.lane_steps_per_s(1) == 10.0
    assert curve.lane_steps_per_s(20) == pytest.approx(79.5)
    assert curve.lane_steps_per_s(200) == 100.0
