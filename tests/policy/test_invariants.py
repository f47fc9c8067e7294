"""What no decision may ever do, whatever the world looks like."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from hydro_slurm.policy import (
    Demand,
    MovePolicy,
    Plan,
    RunningBundle,
    SizingPolicy,
    Slot,
    ThroughputCurve,
    UserShare,
    max_fusion_count,
    place,
)

CURVE = ThroughputCurve(((1, 10.0), (4, 30.0), (16, 50.0), (32, 51.0)))
USERS = ("ada", "ben", "eve")


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[Demand], list[Slot], list[RunningBundle], dict[str, UserShare]]:
    """A consistent moment: bundles hold distinct slots, studies belong to one user each."""
    slots = [
        Slot(
            id=f"s{i:02d}",
            kind=draw(st.sampled_from(["bubble", "bubble", "own"])),
            bubble_s_per_s=draw(st.sampled_from([0.0, 0.1, 0.25, 1.0])),
            free_bytes=draw(st.sampled_from([0, 50, 400, 4000])),
            shut=draw(st.sampled_from([False, False, False, True])),
            device_type=draw(st.sampled_from(["a100", "h100"])),
            study=draw(st.sampled_from(["", "", "", "ada-0"])),
            time_left_s=draw(st.sampled_from([None, None, 5.0, 500.0])),
        )
        for i in range(draw(st.integers(0, 10)))
    ]
    demands, bundles = [], []
    for user in USERS[: draw(st.integers(1, 3))]:
        for number in range(draw(st.integers(0, 2))):
            study = f"{user}-{number}"
            sizing = SizingPolicy(
                max_lanes=draw(st.integers(1, 20)),
                lane_bytes=draw(st.sampled_from([0, 30])),
                curve=draw(st.sampled_from([None, CURVE])),
            )
            for purpose in draw(st.sampled_from([("search",), ("search", "verify")])):
                demands.append(
                    Demand(
                        purpose=purpose,
                        num_waiting=draw(st.integers(0, 40)),
                        sizing=sizing,
                        study=study,
                        user=user,
                        promoted=purpose == "verify",
                        relative_speed=draw(st.sampled_from([{}, {"h100": 3.0}])),
                        piece_s=draw(st.sampled_from([0.0, 10.0])),
                        waited_s=draw(st.sampled_from([0.0, 60.0])),
                    )
                )
    for slot in slots:
        owners = [d for d in demands if slot.study in ("", d.study)]
        if owners and draw(st.booleans()):
            demand = draw(st.sampled_from(owners))
            max_lanes = demand.sizing.max_lanes
            bundles.append(
                RunningBundle(
                    id=f"b-{slot.id}",
                    slot_id=slot.id,
                    purpose=demand.purpose,
                    num_lanes=draw(st.integers(0, max_lanes)),
                    max_lanes=max_lanes,
                    finishing=draw(st.booleans()),
                    study=demand.study,
                    user=demand.user,
                    remaining_s=draw(st.sampled_from([None, 10.0, 1000.0])),
                )
            )
    users = {"ada": UserShare(weight=draw(st.sampled_from([1.0, 3.0])), max_slots=draw(st.sampled_from([None, 0, 2])))}
    return demands, slots, bundles, users


@settings(max_examples=150, deadline=None)
@given(world=worlds(), data=st.data())
def test_a_plan_never_oversteps(
    world: tuple[list[Demand], list[Slot], list[RunningBundle], dict[str, UserShare]], data: st.DataObject
) -> None:
    demands, slots, bundles, users = world
    plan = place(demands, slots, bundles, users)
    shuffled = place(demands, data.draw(st.permutations(slots)), data.draw(st.permutations(bundles)), users)
    assert plan == shuffled, "the order of slots and bundles has no say"

    by_slot = {slot.id: slot for slot in slots}
    by_bundle = {bundle.id: bundle for bundle in bundles}
    by_demand = {(demand.study, demand.purpose): demand for demand in demands}
    holders = Counter([launch.slot_id for launch in plan.launches] + [bundle.slot_id for bundle in bundles])
    assert all(count == 1 for count in holders.values()), "no slot is used twice"

    placed: Counter[tuple[str, str]] = Counter()
    for launch in plan.launches:
        slot, demand = by_slot[launch.slot_id], by_demand[launch.study, launch.purpose]
        assert 0 < launch.num_lanes <= max_fusion_count(slot.free_bytes, demand.sizing), "caps are respected"
        assert not slot.shut
        assert slot.bubble_s_per_s > 0
        assert slot.study in ("", demand.study)
        assert slot.time_left_s is None or demand.piece_s <= slot.time_left_s * slot.bubble_s_per_s * 3.0
        placed[launch.study, launch.purpose] += launch.num_lanes
    leaving = {finish.bundle_id for finish in plan.finishes}
    assert len(leaving) == len(plan.finishes)
    for refill in plan.refills:
        bundle = by_bundle[refill.bundle_id]
        assert refill.num_lanes > 0
        assert bundle.num_lanes + refill.num_lanes <= bundle.max_lanes
        assert not bundle.finishing
        assert bundle.id not in leaving, "what leaves gets nothing more"
        placed[bundle.study, bundle.purpose] += refill.num_lanes
    for key, count in placed.items():
        assert count <= by_demand[key].num_waiting, "nothing is placed without demand"

    held: Counter[str] = Counter(bundle.user for bundle in bundles)
    launched: Counter[str] = Counter(by_demand[launch.study, launch.purpose].user for launch in plan.launches)
    for user, count in launched.items():
        limit = users.get(user, UserShare()).max_slots
        assert limit is None or held[user] + count <= limit

    for bundle in bundles:
        if by_slot[bundle.slot_id].shut and not bundle.finishing:
            assert bundle.id in leaving, "what runs on a shut slot leaves"
    num_must = sum(by_slot[by_bundle[name].slot_id].shut for name in leaving)
    assert len(leaving) - num_must <= MovePolicy().allowance(len(slots), 0), "few bundles are moved"


@settings(max_examples=100, deadline=None)
@given(world=worlds())
def test_a_slot_that_somebody_could_use_does_not_stay_free(
    world: tuple[list[Demand], list[Slot], list[RunningBundle], dict[str, UserShare]],
) -> None:
    demands, slots, _, _ = world
    plain = [replace(demand, promoted=False, piece_s=0.0) for demand in demands]
    plan = place(plain, slots, [])
    open_slots = [slot for slot in slots if not slot.shut and slot.bubble_s_per_s > 0]
    usable = [
        (demand, slot)
        for demand in plain
        for slot in open_slots
        if demand.num_waiting
        and slot.study in ("", demand.study)
        and max_fusion_count(slot.free_bytes, demand.sizing) > 0
    ]
    assert bool(plan.launches) == bool(usable)


class Cluster:
    """A toy world that carries plans out: a bundle's lanes end after a few rounds."""

    def __init__(self, demands: list[Demand], slots: list[Slot], users: dict[str, UserShare]) -> None:
        self.demands = {demand.study: demand for demand in demands}
        self.slots, self.users = slots, users
        self.bundles: dict[str, RunningBundle] = {}
        self.ages: Counter[str] = Counter()
        self.last_served = dict.fromkeys(self.demands, 0)
        self.round = self.num_launched = 0

    def step(self, lane_rounds: int) -> Plan:
        self.round += 1
        for name in list(self.bundles):
            self.ages[name] += 1
            if self.bundles[name].finishing or self.ages[name] % lane_rounds == 0:
                bundle = self.bundles.pop(name)
                if bundle.finishing:
                    self._wait(bundle.study, bundle.num_lanes)
        waiting = [
            replace(demand, waited_s=float(self.round - self.last_served[demand.study]))
            for demand in self.demands.values()
        ]
        plan = place(waiting, self.slots, list(self.bundles.values()), self.users)
        for finish in plan.finishes:
            self.bundles[finish.bundle_id] = replace(self.bundles[finish.bundle_id], finishing=True)
        for refill in plan.refills:
            bundle = self.bundles[refill.bundle_id]
            self._wait(bundle.study, -refill.num_lanes)
            self.bundles[bundle.id] = replace(bundle, num_lanes=bundle.num_lanes + refill.num_lanes)
        for launch in plan.launches:
            self.num_launched += 1
            demand = self.demands[launch.study]
            self._wait(launch.study, -launch.num_lanes)
            self.bundles[f"b{self.num_launched}"] = RunningBundle(
                id=f"b{self.num_launched}",
                slot_id=launch.slot_id,
                purpose=launch.purpose,
                num_lanes=launch.num_lanes,
                max_lanes=demand.sizing.max_lanes,
                study=launch.study,
                user=demand.user,
            )
        for bundle in self.bundles.values():
            self.last_served[bundle.study] = self.round
        return plan

    def _wait(self, study: str, number: int) -> None:
        self.demands[study] = replace(self.demands[study], num_waiting=self.demands[study].num_waiting + number)


@settings(max_examples=30, deadline=None)
@given(
    num_studies=st.integers(1, 6),
    num_slots=st.integers(1, 4),
    max_lanes=st.integers(1, 4),
    lane_rounds=st.integers(1, 4),
    weights=st.tuples(st.sampled_from([1.0, 10.0]), st.sampled_from([1.0, 5.0])),
)
def test_nobody_starves(
    num_studies: int, num_slots: int, max_lanes: int, lane_rounds: int, weights: tuple[float, float]
) -> None:
    demands = [
        Demand(
            purpose="search",
            num_waiting=10_000,
            sizing=SizingPolicy(max_lanes=max_lanes),
            study=f"t{i}",
            user=USERS[i % 2],
        )
        for i in range(num_studies)
    ]
    users = dict(zip(USERS, (UserShare(weight=w) for w in weights), strict=False))
    cluster = Cluster(demands, [Slot(id=f"s{i}") for i in range(num_slots)], users)
    patience = 4 * lane_rounds * (num_studies + 2)
    for _ in range(3 * patience):
        cluster.step(lane_rounds)
        for study, served in cluster.last_served.items():
            assert cluster.round - served <= patience, f"{study} has waited for {patience} rounds"


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4), num_slots=st.integers(1, 6))
def test_an_undisturbed_world_settles(sizes: list[int], num_slots: int) -> None:
    demands = [
        Demand(purpose="search", num_waiting=size, sizing=SizingPolicy(max_lanes=8), study=f"t{i}")
        for i, size in enumerate(sizes)
    ]
    cluster = Cluster(demands, [Slot(id=f"s{i}") for i in range(num_slots)], {})
    for _ in range(20):
        cluster.step(10_000)
    assert not cluster.step(10_000), "bundles keep moving though nothing changes"
