"""When a bundle that runs has to leave its slot: rarely, because each move costs a checkpoint and a start."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hydro_slurm.errors import ConfigError
from hydro_slurm.policy.claims import Claimant, class_of, speed_of
from hydro_slurm.policy.sizing import max_fusion_count
from hydro_slurm.policy.spread import Place, spread_lanes
from hydro_slurm.policy.world import Demand, Finish, RunningBundle, Slot

_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class MovePolicy:
    """What a move costs, and how many there may be."""

    cost_s: float = 20.0
    """Seconds that a bundle's lanes stand still when it moves: checkpoint, start, and the decision in between."""
    min_gain: float = 0.2
    """A bundle moves to idle slots only if that shortens its remaining time by this share, and by twice the cost."""
    max_share: float = 0.05
    """Bundles that may be on the move at a time, as a share of the slots; one always may."""

    def __post_init__(self) -> None:
        if self.cost_s < 0 or not 0 <= self.min_gain < 1 or not 0 <= self.max_share <= 1:
            raise ConfigError(
                f"moves: cost_s must be 0 or more, min_gain lie in [0, 1) and max_share in [0, 1], got {self.cost_s}, "
                f"{self.min_gain} and {self.max_share}"
            )

    def allowance(self, num_slots: int, num_leaving: int) -> int:
        """How many more bundles may be sent away now."""
        return max(max(1, math.floor(self.max_share * num_slots)) - num_leaving, 0)


def finishes_that_must_be(slots: Mapping[str, Slot], bundles: Sequence[RunningBundle]) -> list[Finish]:
    """Bundles on shut slots, and bundles that no longer fit, leave whatever that costs."""
    finishes = []
    for bundle in bundles:
        slot = slots.get(bundle.slot_id)
        if bundle.finishing or slot is None:
            continue
        if slot.shut:
            finishes.append(Finish(bundle.id, "the guard has shut this slot"))
        elif 0 < bundle.max_lanes < bundle.num_lanes:
            finishes.append(Finish(bundle.id, f"its slot has memory for {bundle.max_lanes} lanes only"))
    return finishes


def moves_for_promoted(
    claimants: Sequence[Claimant], slots: Mapping[str, Slot], waiting: Mapping[int, int]
) -> list[Finish]:
    """Early trials leave an exclusive device that promoted trials of the same study wait for.

    Args:
        claimants: Everybody.
        slots: All slots.
        waiting: Promoted trials that found no place, by the claimant's order.
    """
    finishes = []
    for claimant in claimants:
        if not waiting.get(claimant.order) or any(slot.kind == "own" for slot in claimant.being_left):
            continue
        promoted = {demand.purpose for demand in claimant.demands if demand.promoted}
        for bundle in claimant.bundles:
            slot = slots.get(bundle.slot_id)
            if slot is not None and slot.kind == "own" and bundle.purpose not in promoted:
                finishes.append(Finish(bundle.id, "promoted trials need this exclusive device"))
                break
    return finishes


def moves_for_fairness(claimants: Sequence[Claimant], slots: Mapping[str, Slot], allowance: int) -> list[Finish]:
    """Who has a whole slot less than a fair share, and waits, gets one of who has a whole slot more."""
    finishes: list[Finish] = []
    sent: set[str] = set()
    needy = sorted(
        (claimant for claimant in claimants if claimant.unserved and not claimant.being_left),
        key=lambda claimant: (claimant.num_held / claimant.target if claimant.target else math.inf, claimant.order),
    )
    for claimant in needy:
        num_held, limit = claimant.num_held, claimant.share.max_slots
        while len(finishes) < allowance and num_held + 1 <= claimant.target + _ROUNDING:
            if limit is not None and num_held >= limit:
                break
            victim = _bundle_to_give(claimant, claimants, slots, sent)
            if victim is None:
                break
            donor, bundle = victim
            donor.held[class_of(slots[bundle.slot_id])] -= 1
            sent.add(bundle.id)
            finishes.append(Finish(bundle.id, f"its slot goes to {claimant.study or 'a study'}, which has less"))
            num_held += 1
    return finishes


def _bundle_to_give(
    needy: Claimant, claimants: Sequence[Claimant], slots: Mapping[str, Slot], sent: set[str]
) -> tuple[Claimant, RunningBundle] | None:
    """The smallest bundle, on a slot that the needy can use, of the claimant that is furthest above its share."""
    donors = [donor for donor in claimants if donor is not needy and donor.num_held - 1 >= donor.target - _ROUNDING]
    for donor in sorted(donors, key=lambda donor: (donor.target - donor.num_held, donor.order)):
        usable = [
            bundle
            for bundle in donor.bundles
            if bundle.id not in sent
            and bundle.slot_id in slots
            and slots[bundle.slot_id].is_shared
            and needy.may_use(slots[bundle.slot_id])
        ]
        if usable:
            return donor, min(usable, key=lambda bundle: (bundle.num_lanes + bundle.num_waiting, bundle.id))
    return None


def moves_to_faster_places(
    claimants: Sequence[Claimant],
    slots: Mapping[str, Slot],
    idle: Sequence[Slot],
    policy: MovePolicy,
    allowance: int,
) -> list[Finish]:
    """When nothing of a study waits any more, what still runs gets idle slots, and room in its faster bundles.

    For each study that is the bundle that would end last, if its lanes end sooner by leaving than by staying.
    """
    finishes: list[Finish] = []
    left = list(idle)
    for claimant in claimants:
        if len(finishes) >= allowance:
            break
        if claimant.unserved or claimant.being_left:
            continue
        known = [bundle for bundle in claimant.bundles if bundle.remaining_s is not None and bundle.slot_id in slots]
        last = min(known, key=lambda bundle: (-(bundle.remaining_s or 0.0), bundle.id), default=None)
        demand = None if last is None else _demand_of(claimant, last)
        if last is None or demand is None:
            continue
        used = _worthwhile(last, demand, known, claimant, left, policy)
        if used is not None:
            finishes.append(Finish(last.id, "its lanes are spread over faster places"))
            left = [slot for slot in left if slot.id not in used]
    return finishes


def _demand_of(claimant: Claimant, bundle: RunningBundle) -> Demand | None:
    matching = (d for d in claimant.demands if (d.purpose, d.group) == (bundle.purpose, bundle.group))
    return next(matching, None)


def _worthwhile(
    bundle: RunningBundle,
    demand: Demand,
    known: Sequence[RunningBundle],
    claimant: Claimant,
    idle: Sequence[Slot],
    policy: MovePolicy,
) -> set[str] | None:
    """The idle slots that its lanes would be spread over; None if it had better stay."""
    costs, remaining_s = demand.sizing.step_costs(), bundle.remaining_s or 0.0
    limit = claimant.share.max_slots
    num_more = len(idle) if limit is None else max(limit - claimant.num_held, 0)
    usable = [slot for slot in idle if claimant.fits(demand, slot)][:num_more]
    others = [other for other in known if other.id != bundle.id and _demand_of(claimant, other) is demand]
    speed = speed_of(demand, claimant.slots[bundle.slot_id])
    num_lanes = min(bundle.num_lanes + bundle.num_waiting, len(costs) - 1)
    if num_lanes == 0 or speed <= 0:
        return None
    places = [
        Place(other.num_lanes, other.max_lanes, speed_of(demand, claimant.slots[other.slot_id])) for other in others
    ]
    places += [Place(0, max_fusion_count(slot.free_bytes, demand.sizing), speed_of(demand, slot)) for slot in usable]
    places.append(Place(0, bundle.max_lanes, speed))
    lanes = spread_lanes(num_lanes, places, costs)
    step_s = costs[num_lanes] / speed
    ends_s = [
        remaining_s * costs[place.lanes + count] / place.speed / step_s + policy.cost_s
        for place, count in zip(places, lanes, strict=True)
        if count
    ]
    # Lanes that join a bundle slow down those that it has.
    ends_s += [
        (other.remaining_s or 0.0) * costs[other.num_lanes + count] / costs[other.num_lanes]
        for other, count in zip(others, lanes, strict=False)
        if count and other.num_lanes
    ]
    if remaining_s - max(ends_s) < max(policy.min_gain * remaining_s, policy.cost_s):
        return None
    return {slot.id for slot, count in zip(usable, lanes[len(others) :], strict=False) if count}
