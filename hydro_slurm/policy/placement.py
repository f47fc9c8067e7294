"""Which bundle runs on which slot, with how many lanes. Deterministic: equal inputs give equal plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hydro_slurm.policy.sizing import SizingPolicy, fusion_count


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """A device that bundles may use: in a host job's bubbles (kind "bubble") or alone (kind "own")."""

    id: str
    kind: str = "bubble"
    bubble_s_per_s: float = 1.0
    """Expected usable seconds per second; 1 for a device of its own."""
    free_bytes: int = 0
    shut: bool = False
    """The guard has shut the slot: nothing is placed there, what runs there leaves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningBundle:
    """A bundle that holds a slot."""

    id: str
    slot_id: str
    purpose: str
    num_lanes: int
    num_waiting: int = 0
    """Trials handed to it that wait inside it for a free lane."""
    max_lanes: int = 1
    finishing: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """Trials that could start now, for one purpose ("search" or "verify")."""

    purpose: str
    num_waiting: int
    sizing: SizingPolicy


@dataclass(frozen=True, slots=True)
class Launch:
    """Start a bundle on a slot with this many lanes."""

    slot_id: str
    purpose: str
    num_lanes: int


@dataclass(frozen=True, slots=True)
class Refill:
    """Hand more trials to a running bundle."""

    bundle_id: str
    num_lanes: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Make a bundle checkpoint its lanes and leave."""

    bundle_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What one decision changes; empty when everything is as it should be."""

    launches: tuple[Launch, ...] = ()
    refills: tuple[Refill, ...] = ()
    finishes: tuple[Finish, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.launches or self.refills or self.finishes)


def place(demands: Sequence[Demand], slots: Sequence[Slot], bundles: Sequence[RunningBundle]) -> Plan:
    """Decide what to launch, refill and finish.

    Bundles leave slots that the guard has shut. Running bundles are topped up first (a lane that is free costs
    nothing to fill), then free slots get new bundles, those with the most bubble time first. Slots that a bundle is
    about to leave get their share of the waiting trials too, later. Demands are served in the given order.
    """
    slot_by_id = {slot.id: slot for slot in slots}
    finishes = tuple(
        Finish(bundle.id, "the guard has shut this slot")
        for bundle in sorted(bundles, key=lambda bundle: bundle.id)
        if not bundle.finishing and bundle.slot_id in slot_by_id and slot_by_id[bundle.slot_id].shut
    )
    leaving = {finish.bundle_id for finish in finishes}
    taken = {bundle.slot_id for bundle in bundles}
    free = sorted(
        (slot for slot in slots if slot.id not in taken and not slot.shut),
        key=lambda slot: (-slot.bubble_s_per_s, slot.id),
    )
    num_leaving = sum(bundle.finishing and bundle.slot_id in slot_by_id for bundle in bundles)
    launches: list[Launch] = []
    refills: list[Refill] = []
    for demand in demands:
        num_waiting = demand.num_waiting
        active = [
            bundle
            for bundle in bundles
            if bundle.purpose == demand.purpose and not bundle.finishing and bundle.id not in leaving
        ]
        for bundle in sorted(active, key=lambda bundle: (bundle.num_lanes + bundle.num_waiting, bundle.id)):
            num_lanes = min(num_waiting, bundle.max_lanes - bundle.num_lanes - bundle.num_waiting)
            num_lanes = _leave_for_free_slots(num_lanes, num_waiting, len(free) + num_leaving)
            if num_lanes > 0:
                refills.append(Refill(bundle.id, num_lanes))
                num_waiting -= num_lanes
        still_free = []
        for position, slot in enumerate(free):
            num_lanes = fusion_count(num_waiting, len(free) - position + num_leaving, slot.free_bytes, demand.sizing)
            if num_lanes == 0:
                still_free.append(slot)
                continue
            launches.append(Launch(slot.id, demand.purpose, num_lanes))
            num_waiting -= num_lanes
        free = still_free
    return Plan(tuple(launches), tuple(refills), finishes)


def _leave_for_free_slots(num_lanes: int, num_waiting: int, num_free_slots: int) -> int:
    """Keep an even share of the waiting trials for slots that stand empty, or will in a moment."""
    if num_free_slots == 0:
        return num_lanes
    return min(num_lanes, num_waiting // (num_free_slots + 1))
