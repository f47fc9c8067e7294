"""Who claims slots: one claimant per study, with what it waits for, what it holds, and its fair share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hydro_slurm.policy.allocation import Claim, SlotClass, allocate
from hydro_slurm.policy.sizing import max_fusion_count
from hydro_slurm.policy.world import Demand, RunningBundle, Slot, UserShare

_UNLIMITED = UserShare()


@dataclass(slots=True)
class Claimant:
    """A study in one decision."""

    user: str
    study: str
    order: int
    share: UserShare
    slots: Mapping[str, Slot]
    """All slots of the decision, by id."""
    demands: list[Demand] = field(default_factory=list)
    bundles: list[RunningBundle] = field(default_factory=list)
    """Active ones: they neither finish nor have to leave."""
    being_left: list[Slot] = field(default_factory=list)
    """Slots that its bundles are about to leave."""
    has_own_slot: bool = False
    held: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Shared slots by class: those of its bundles, and those that it is granted in this decision."""
    targets: dict[tuple[str, str], float] = field(default_factory=dict)
    """Fair share of the shared slots, by class."""
    unserved: int = 0
    """Trials that still wait after this decision."""

    @property
    def num_waiting(self) -> int:
        return sum(demand.num_waiting for demand in self.demands)

    @property
    def target(self) -> float:
        return sum(self.targets.values())

    @property
    def num_held(self) -> int:
        return self.held.total()

    def need(self, key: tuple[str, str]) -> tuple[float, float, float, int]:
        """Sorts claimants for a slot of a class: who has least of its share, has used least, has waited longest."""
        target = self.targets.get(key, 0.0)
        filled = self.held[key] / target if target > 0 else float("inf")
        waited_s = max((demand.waited_s for demand in self.demands), default=0.0)
        return filled, self.share.usage_s / self.share.weight, -waited_s, self.order

    def may_use(self, slot: Slot) -> bool:
        """Whether one of its demands that waits can start there."""
        return any(demand.num_waiting and self.fits(demand, slot) for demand in self.demands)

    def fits(self, demand: Demand, slot: Slot) -> bool:
        """Whether a bundle of this demand can use a slot: owner, memory, time left, promotion."""
        if slot.shut or slot.bubble_s_per_s <= 0 or slot.study not in ("", self.study):
            return False
        if slot.user not in ("", self.user):
            return False
        if demand.promoted and self.has_own_slot and slot.kind != "own":
            return False
        if slot.time_left_s is not None and demand.piece_s > slot.time_left_s * speed_of(demand, slot):
            return False
        return max_fusion_count(slot.free_bytes, demand.sizing) > 0


def speed_of(demand: Demand, slot: Slot) -> float:
    """Seconds of the reference device per second on this slot."""
    return slot.bubble_s_per_s * demand.relative_speed.get(slot.device_type, 1.0)


def class_of(slot: Slot) -> tuple[str, str]:
    """Slots of one kind and device type are one class for the shares."""
    return slot.kind, slot.device_type


def make_claimants(
    demands: Sequence[Demand],
    slots: Mapping[str, Slot],
    bundles: Sequence[RunningBundle],
    active: Sequence[RunningBundle],
    users: Mapping[str, UserShare],
) -> list[Claimant]:
    """One claimant per study that waits or runs, in the order of the demands, with its fair share of the slots."""
    claimants: dict[tuple[str, str], Claimant] = {}

    def claimant_of(user: str, study: str) -> Claimant:
        found = claimants.get((user, study))
        if found is None:
            found = Claimant(user, study, len(claimants), users.get(user, _UNLIMITED), slots)
            claimants[user, study] = found
        return found

    for demand in demands:
        claimant_of(demand.user, demand.study).demands.append(demand)
    for bundle in active:
        claimant = claimant_of(bundle.user, bundle.study)
        claimant.bundles.append(bundle)
        slot = slots.get(bundle.slot_id)
        if slot is not None and slot.is_shared:
            claimant.held[class_of(slot)] += 1
    for bundle in bundles:
        slot = slots.get(bundle.slot_id)
        if bundle.finishing and slot is not None and not slot.shut:
            claimant_of(bundle.user, bundle.study).being_left.append(slot)
    owners = {slot.study for slot in slots.values() if slot.kind == "own" and not slot.shut}
    for claimant in claimants.values():
        claimant.has_own_slot = "" in owners or claimant.study in owners
    _set_targets(list(claimants.values()), slots)
    return list(claimants.values())


def _set_targets(claimants: Sequence[Claimant], slots: Mapping[str, Slot]) -> None:
    shared: dict[tuple[str, str], list[float]] = {}
    for slot in slots.values():
        if slot.is_shared and not slot.shut and slot.bubble_s_per_s > 0:
            shared.setdefault(class_of(slot), []).append(slot.bubble_s_per_s)
    classes = [
        SlotClass(kind, device_type, sum(sorted(speeds)) / len(speeds), len(speeds))
        for (kind, device_type), speeds in sorted(shared.items())
    ]
    num_studies = Counter(claimant.user for claimant in claimants)
    claims = [
        Claim(
            claimant.share.weight / num_studies[claimant.user],
            _most_slots(claimant),
            claimant.demands[0].relative_speed if claimant.demands else {},
        )
        for claimant in claimants
    ]
    for claimant, row in zip(claimants, allocate(claims, classes), strict=True):
        claimant.targets = {
            (each.kind, each.device_type): share for each, share in zip(classes, row, strict=True) if share > 0
        }


def _most_slots(claimant: Claimant) -> float:
    """A slot holds one lane at least; a user's limit binds each of his studies."""
    lanes = claimant.num_waiting + sum(bundle.num_lanes + bundle.num_waiting for bundle in claimant.bundles)
    limit = claimant.share.max_slots
    return float(lanes if limit is None else min(lanes, limit))
