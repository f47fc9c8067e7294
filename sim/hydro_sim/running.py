"""The bundles that run in a simulation: started, refilled and ended as the policy's plans say."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from hydro_sim.bundle import Bundle
from hydro_sim.engine import Engine
from hydro_sim.settings import OverheadConfig
from hydro_sim.studies import Study
from hydro_slurm.policy import Finish, Launch, Plan, Refill, Slot, max_fusion_count


@dataclass(frozen=True, slots=True)
class BundleRecord:
    """A bundle that has ended, for the results."""

    id: str
    study: str
    purpose: str
    slot: str
    host: str
    """Empty for a device of the study's own."""
    start_s: float
    end_s: float
    num_lanes: int
    num_trials: int
    """Trials that were handed to it, over its whole life."""
    lane_steps: float
    device_s: float
    """Its work, as seconds of a device of its own."""


class RunningBundles:
    """Bundles by id and by slot.

    Args:
        engine: Tells the time, and calls back.
        overheads: What starting, refilling and leaving take.
        advanced: Called with a study whenever one of its trials has reached a rung.
        changed: Called when there may be something to decide.
    """

    def __init__(
        self,
        engine: Engine,
        overheads: OverheadConfig,
        advanced: Callable[[Study], None],
        changed: Callable[[], None],
    ) -> None:
        self.engine, self.overheads = engine, overheads
        self.by_id: dict[str, Bundle] = {}
        self.on_slot: dict[str, Bundle] = {}
        self.records: list[BundleRecord] = []
        self.num_moves: Counter[str] = Counter()
        """Finishes that the policy asked for, by reason."""
        self.user_slot_s: defaultdict[str, float] = defaultdict(float)
        self._advanced, self._changed = advanced, changed
        self._num_bundles = 0

    def of(self, study: Study) -> list[Bundle]:
        """The bundles of a study."""
        return [bundle for bundle in self.by_id.values() if bundle.study is study]

    def advance(self) -> None:
        """Count the steps of all bundles up to now."""
        for bundle in self.by_id.values():
            bundle.advance(self.engine.now_s)

    def apply(self, plan: Plan, slots: dict[str, Slot], hosts: dict[str, str], studies: dict[str, Study]) -> None:
        """Carry a plan out.

        Args:
            plan: What the policy has decided.
            slots: All slots by id.
            hosts: The host of each slot that lies in bubbles.
            studies: Active studies by id.
        """
        for finish in plan.finishes:
            self._finish(finish)
        for refill in plan.refills:
            self._refill(refill)
        for launch in plan.launches:
            self._launch(launch, slots[launch.slot_id], hosts.get(launch.slot_id, ""), studies[launch.study])
        for bundle in [bundle for bundle in self.by_id.values() if not bundle.lanes and not bundle.finishing]:
            self._left(bundle)  # it ran dry and gets nothing more

    def _launch(self, launch: Launch, slot: Slot, host: str, study: Study) -> None:
        lanes = study.take(launch.purpose, launch.num_lanes)
        if not lanes:
            return
        now_s = self.engine.now_s
        sizing = study.sizing if launch.purpose == "search" else study.target_sizing
        self._num_bundles += 1
        study.num_bundles += 1
        bundle = Bundle(
            id=f"b{self._num_bundles:06d}",
            study=study,
            slot=slot,
            host=host,
            purpose=launch.purpose,
            sizing=sizing,
            max_lanes=max_fusion_count(slot.free_bytes, sizing),
            start_s=now_s,
            speed=slot.bubble_s_per_s * study.config.relative_speed.get(slot.device_type, 1.0),
            waiting=lanes,
            num_trials=len(lanes),
            updated_s=now_s + self.overheads.launch_s,
        )
        bundle.admit()
        if study.start_s < 0:
            study.start_s = now_s
        self.by_id[bundle.id] = self.on_slot[slot.id] = bundle
        self._foresee(bundle)

    def _refill(self, refill: Refill) -> None:
        bundle = self.by_id[refill.bundle_id]
        taken = bundle.study.take(bundle.purpose, refill.num_lanes)
        if taken:
            bundle.waiting += taken
            bundle.num_trials += len(taken)
            bundle.admit()
            bundle.stand_still(self.overheads.refill_s)
            self._foresee(bundle)

    def _finish(self, finish: Finish) -> None:
        bundle = self.by_id[finish.bundle_id]
        if bundle.finishing:
            return
        self.num_moves[finish.reason.partition(" to ")[0]] += 1
        bundle.finishing = True
        bundle.version += 1
        self._when(bundle, self.engine.now_s + self.overheads.leave_s, lambda: self._left(bundle))

    def _left(self, bundle: Bundle) -> None:
        self.end(bundle, lost=False)
        self._changed()

    def _foresee(self, bundle: Bundle) -> None:
        """Plan the moment at which the next lane reaches its rung."""
        bundle.version += 1
        next_s = bundle.next_rung_s()
        if next_s != float("inf") and not bundle.finishing:
            self._when(bundle, next_s, lambda: self._at_rung(bundle))

    def _when(self, bundle: Bundle, time_s: float, function: Callable[[], None]) -> None:
        version = bundle.version

        def call() -> None:
            if bundle.version == version and bundle.id in self.by_id:
                function()

        self.engine.call_at(max(time_s, self.engine.now_s), call)

    def _at_rung(self, bundle: Bundle) -> None:
        now_s, study = self.engine.now_s, bundle.study
        bundle.advance(now_s)
        tolerance = 1e-6 + 1e-9 * bundle.lanes[0].rungs[-1]
        due = [trial for trial in bundle.lanes if trial.steps_to_rung <= tolerance]
        for trial in sorted(due, key=lambda trial: (trial.value, trial.number)):
            if not study.reach_rung(trial, now_s):
                bundle.lanes.remove(trial)
        bundle.stand_still(self.overheads.rung_s / max(bundle.slot.bubble_s_per_s, 1e-9))
        bundle.admit()
        self._advanced(study)
        if not bundle.lanes and bundle.id in self.by_id and (study.verifying or self._nothing_for(bundle)):
            self.end(bundle, lost=False)
        else:
            self._foresee(bundle)
        self._changed()

    def _nothing_for(self, bundle: Bundle) -> bool:
        """An empty bundle stays for a refill only if there is something to refill it with."""
        study = bundle.study
        return not (study.waiting if bundle.purpose == "search" else study.verify_waiting)

    def end(self, bundle: Bundle, *, lost: bool) -> None:
        """A bundle is gone; its trials wait again, those of a lost one from their last checkpoints."""
        now_s, study = self.engine.now_s, bundle.study
        bundle.advance(now_s)
        del self.by_id[bundle.id], self.on_slot[bundle.slot.id]
        every_s = self.overheads.checkpoint_every_s
        lost_steps = bundle.busy_s % every_s * bundle.steps_per_s() if lost else 0.0
        for trial in [*bundle.lanes, *bundle.waiting]:
            study.give_back(trial, lost_steps)
        held_s = now_s - bundle.start_s
        study.last_held_s = now_s
        study.lane_steps += bundle.lane_steps
        self.user_slot_s[study.user] += held_s
        if bundle.host:
            study.bubble_device_s += bundle.busy_s * bundle.slot.bubble_s_per_s
        self.records.append(
            BundleRecord(
                bundle.id,
                study.id,
                bundle.purpose,
                bundle.slot.id,
                bundle.host,
                bundle.start_s,
                now_s,
                bundle.max_num_lanes,
                bundle.num_trials,
                bundle.lane_steps,
                bundle.busy_s * bundle.slot.bubble_s_per_s,
            )
        )
