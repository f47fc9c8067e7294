"""Which bundle runs on which slot, with how many lanes. Deterministic: equal inputs give equal plans."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby

from hydro_slurm.policy.claims import Claimant, class_of, make_claimants, speed_of
from hydro_slurm.policy.moves import (
    MovePolicy,
    finishes_that_must_be,
    moves_for_fairness,
    moves_for_promoted,
    moves_to_faster_places,
)
from hydro_slurm.policy.sizing import max_fusion_count
from hydro_slurm.policy.spread import Place, spread_lanes
from hydro_slurm.policy.world import Demand, Launch, Plan, Refill, RunningBundle, Slot, UserShare


def place(
    demands: Sequence[Demand],
    slots: Sequence[Slot],
    bundles: Sequence[RunningBundle],
    users: Mapping[str, UserShare] | None = None,
    moves: MovePolicy | None = None,
) -> Plan:
    """Decide what to launch, refill and finish.

    - Bundles leave slots that the guard has shut; nothing starts there.
    - Free slots, the fastest first, go to the study that has least of its fair share (`allocation`); what it leaves
      is offered to the others. Within a study, demands are served in the given order.
    - A study's lanes are spread over its running bundles and its new slots so that the last one ends early
      (`spread`). Slots that its bundles are about to leave get their part too, later.
    - Promoted trials go to exclusive devices where their study has one, and before its early ones.
    - A slot whose host is due to end gets only what has a result before that.
    - A study at or above its share gets no refills while another holds nothing and waits: so slots come free.
    - Few bundles are moved (`moves`).

    Args:
        demands: What waits. Among equals, earlier ones go first.
        slots: All slots, those in use included, in any order.
        bundles: All bundles that hold slots, in any order.
        users: Weights and limits; users that are missing have the defaults of `UserShare`.
        moves: When bundles are moved.
    """
    return _Decision(demands, slots, bundles, users or {}, moves or MovePolicy()).decide()


class _Decision:
    def __init__(
        self,
        demands: Sequence[Demand],
        slots: Sequence[Slot],
        bundles: Sequence[RunningBundle],
        users: Mapping[str, UserShare],
        moves: MovePolicy,
    ) -> None:
        self.moves = moves
        self.slots = {slot.id: slot for slot in sorted(slots, key=lambda slot: slot.id)}
        ordered = sorted(bundles, key=lambda bundle: bundle.id)
        self.finishes = finishes_that_must_be(self.slots, ordered)
        leaving = {finish.bundle_id for finish in self.finishes}
        self.active = [bundle for bundle in ordered if not bundle.finishing and bundle.id not in leaving]
        self.num_leaving = len(ordered) - len(self.active)
        taken = {bundle.slot_id for bundle in bundles}
        self.free = sorted(
            (slot for slot in slots if slot.id not in taken and not slot.shut and slot.bubble_s_per_s > 0),
            key=lambda slot: (-slot.bubble_s_per_s, slot.id),
        )
        self.claimants = make_claimants(demands, self.slots, ordered, self.active, users)
        self.user_slots = Counter(bundle.user for bundle in ordered)
        self.granted: dict[int, list[Slot]] = {claimant.order: [] for claimant in self.claimants}
        self.plans: dict[int, _Service] = {}

    def decide(self) -> Plan:
        """One decision."""
        served = [claimant for claimant in self.claimants if claimant.num_waiting]
        first = True
        while served and (self._grant(served) or first):
            first = False
            needy = self._waits_in_vain()
            for claimant in served:
                self.plans[claimant.order] = _Service(claimant, self.granted[claimant.order], needy)
            # A claimant that leaves slots unused wants no more; what it leaves is offered to the others.
            served = [
                claimant
                for claimant in served
                if not self._take_back(claimant) and self.plans[claimant.order].num_unserved
            ]
        promoted = {}
        for claimant in self.claimants:
            service = self.plans.get(claimant.order)
            claimant.unserved = service.num_unserved if service else 0
            promoted[claimant.order] = service.num_promoted_unserved if service else 0
        self._move(promoted)
        services = list(self.plans.values())
        launches = tuple(launch for service in services for launch in service.launches)
        refills = tuple(refill for service in services for refill in service.refills)
        return Plan(launches, refills, tuple(self.finishes))

    def _move(self, promoted: Mapping[int, int]) -> None:
        allowance = self.moves.allowance(len(self.slots), self.num_leaving)
        found = moves_for_promoted(self.claimants, self.slots, promoted)[:allowance]
        found += moves_for_fairness(self.claimants, self.slots, allowance - len(found))
        if not found:
            found = moves_to_faster_places(self.claimants, self.slots, self.free, self.moves, allowance)
        refilled = {refill.bundle_id for service in self.plans.values() for refill in service.refills}
        known = {finish.bundle_id for finish in self.finishes}
        self.finishes += [finish for finish in found if finish.bundle_id not in refilled | known]

    def _grant(self, wanting: Sequence[Claimant]) -> int:
        """Give free slots, class by class, each to the claimant that needs it most. Returns how many were given."""
        num_free = len(self.free)
        still_free: list[Slot] = []
        num_wanted = {claimant.order: claimant.num_waiting - len(self.granted[claimant.order]) for claimant in wanting}
        for _, group in groupby(self.free, key=_identity):
            alike = list(group)
            key = class_of(alike[0])
            heap = [(claimant.need(key), claimant) for claimant in wanting if claimant.may_use(alike[0])]
            heapq.heapify(heap)
            for slot in alike:
                while heap and (num_wanted[heap[0][1].order] <= 0 or self._at_limit(heap[0][1])):
                    heapq.heappop(heap)
                if not heap:
                    still_free.append(slot)
                    continue
                claimant = heap[0][1]
                self.granted[claimant.order].append(slot)
                num_wanted[claimant.order] -= 1
                self._count(claimant, slot, 1)
                heapq.heapreplace(heap, (claimant.need(key), claimant))
        self.free = still_free
        return num_free - len(still_free)

    def _take_back(self, claimant: Claimant) -> bool:
        """Take the slots back that a claimant was granted and does not use; returns whether there were any."""
        service = self.plans[claimant.order]
        unused = [slot for slot in self.granted[claimant.order] if slot.id not in service.used]
        for slot in unused:
            self._count(claimant, slot, -1)
        self.granted[claimant.order] = [slot for slot in self.granted[claimant.order] if slot.id in service.used]
        self.free = sorted([*self.free, *unused], key=lambda slot: (-slot.bubble_s_per_s, slot.id))
        return bool(unused)

    def _count(self, claimant: Claimant, slot: Slot, number: int) -> None:
        self.user_slots[claimant.user] += number
        if slot.is_shared:
            claimant.held[class_of(slot)] += number

    def _at_limit(self, claimant: Claimant) -> bool:
        limit = claimant.share.max_slots
        return limit is not None and self.user_slots[claimant.user] >= limit

    def _waits_in_vain(self) -> Claimant | None:
        """The first claimant that waits, holds nothing, was granted nothing, and could run where others do."""
        usable = list({_identity(slot): slot for slot in self.slots.values()}.values())
        for claimant in self.claimants:
            if not claimant.num_waiting or claimant.bundles or claimant.being_left or self.granted[claimant.order]:
                continue
            if not self._at_limit(claimant) and any(claimant.may_use(slot) for slot in usable):
                return claimant
        return None


def _identity(slot: Slot) -> tuple[object, ...]:
    """Slots that agree in this are the same to everybody."""
    owner = (slot.study, slot.user)
    return -slot.bubble_s_per_s, slot.kind, slot.device_type, owner, slot.free_bytes, slot.time_left_s, slot.shut


class _Service:
    """What one claimant does with the slots that it was granted."""

    def __init__(self, claimant: Claimant, granted: Sequence[Slot], needy: Claimant | None) -> None:
        self.claimant = claimant
        gives = needy is not None and needy is not claimant and claimant.num_held >= claimant.target
        self.needy = needy if gives else None
        self.launches: list[Launch] = []
        self.refills: list[Refill] = []
        self.used: set[str] = set()
        self.num_unserved = self.num_promoted_unserved = 0
        first = [demand for demand in claimant.demands if demand.promoted and claimant.has_own_slot]
        rest = [demand for demand in claimant.demands if not (demand.promoted and claimant.has_own_slot)]
        for demand in [*first, *rest]:
            if demand.num_waiting:
                self._serve(demand, granted)

    def _serve(self, demand: Demand, granted: Sequence[Slot]) -> None:
        claimant = self.claimant
        bundles = self._refillable_bundles(demand)
        slots = [slot for slot in granted if slot.id not in self.used and claimant.fits(demand, slot)]
        later = [slot for slot in claimant.being_left if claimant.fits(demand, slot)]
        places = [Place(bundle.num_lanes + bundle.num_waiting, bundle.max_lanes, speed) for bundle, speed in bundles]
        places += [
            Place(0, max_fusion_count(slot.free_bytes, demand.sizing), speed_of(demand, slot))
            for slot in [*slots, *later]
        ]
        lanes = spread_lanes(demand.num_waiting, places, demand.sizing.step_costs())
        for (bundle, _), count in zip(bundles, lanes, strict=False):
            if count:
                self.refills.append(Refill(bundle.id, count))
        for slot, count in zip(slots, lanes[len(bundles) :], strict=False):
            if count:
                self.used.add(slot.id)
                self.launches.append(Launch(slot.id, demand.purpose, count, demand.study, demand.group))
        num_unserved = demand.num_waiting - sum(lanes[: len(bundles) + len(slots)])
        self.num_unserved += num_unserved
        if demand.promoted and claimant.has_own_slot:
            self.num_promoted_unserved += num_unserved

    def _refillable_bundles(self, demand: Demand) -> list[tuple[RunningBundle, float]]:
        """Bundles of this demand with the speeds of their slots; not those that are to run dry for somebody else."""
        slots, found = self.claimant.slots, []
        for bundle in sorted(
            self.claimant.bundles, key=lambda bundle: (bundle.num_lanes + bundle.num_waiting, bundle.id)
        ):
            slot = slots.get(bundle.slot_id)
            if slot is None or (bundle.purpose, bundle.group) != (demand.purpose, demand.group):
                continue
            if self.needy is None or not self.needy.may_use(slot):
                found.append((bundle, speed_of(demand, slot)))
        return found
