"""Hosts, bundles and studies on top of the base load, with the daemon's own policy deciding."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

from hydro_sim.bundle import Bundle
from hydro_sim.engine import Engine
from hydro_sim.host_jobs import HostJob
from hydro_sim.settings import Scenario
from hydro_sim.studies import Study
from hydro_slurm.model import RUNNING
from hydro_slurm.policy import (
    Candidate,
    Decider,
    Demand,
    Finish,
    Launch,
    Refill,
    Slot,
    UserShare,
    eager_transfer,
    max_fusion_count,
)

SOON_S = 3600.0
"""Time left to a host's limit is told to the policy from here on; before, it decides nothing."""


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


class Overlay:
    """Puts hosts and studies into an engine and runs them."""

    def __init__(self, engine: Engine, scenario: Scenario, hosts: list[HostJob], studies: list[Study]) -> None:
        self.engine, self.scenario, self.hosts = engine, scenario, hosts
        self.studies = {study.id: study for study in studies}
        self.records: list[BundleRecord] = []
        self.bundles: dict[str, Bundle] = {}
        self.num_moves: Counter[str] = Counter()
        """Finishes that the policy asked for, by reason."""
        self.user_slot_s: defaultdict[str, float] = defaultdict(float)
        self.decider = Decider(scenario.overheads.poll_s, scenario.policy.moves)
        self._active: dict[str, Study] = {}
        self._slots: dict[str, Slot] = {}
        self._host_of: dict[str, HostJob] = {}
        self._on_slot: dict[str, Bundle] = {}
        self._decision_due = False
        self._num_bundles = 0
        self._weights = {user.name: user for user in scenario.users}
        for host in hosts:
            engine.call_at(host.submit_s, lambda host=host: self._submit_host(host))  # type: ignore[misc]
        for study in studies:
            engine.call_at(study.submit_s, lambda study=study: self._submit_study(study))  # type: ignore[misc]

    # --- hosts -----------------------------------------------------------------------------------------------------

    def _submit_host(self, host: HostJob) -> None:
        duration_s = host.work_left_s * (1 + host.config.slowdown)
        host.job = self.engine.submit(duration_s, min(duration_s, host.limit_s), host.devices, host.partition)
        self.engine.on_start[host.job] = lambda _job: self._host_started(host)
        self.engine.on_end[host.job] = lambda _job: self._host_ended(host)

    def _host_started(self, host: HostJob) -> None:
        now_s = self.engine.now_s
        host.start_s = now_s
        if host.first_start_s < 0:
            host.first_start_s = now_s
        if self.scenario.bubbles.enabled:
            offered_s = now_s + max(host.config.learning_s, self.scenario.policy.hosts.min_age_s)
            self.engine.call_at(offered_s, lambda: self._host_offers(host, now_s))

    def _host_offers(self, host: HostJob, start_s: float) -> None:
        if host.start_s != start_s or host.end_s >= 0:
            return  # that run of it has ended
        owner = host.user if self.scenario.policy.mode == "own" else ""
        for slot in host.offer_slots(self.engine.now_s, self.scenario.policy.hosts, owner):
            self._slots[slot.id] = slot
            self._host_of[slot.id] = host
        self._request_decision()

    def _host_ended(self, host: HostJob) -> None:
        host.end_s = self.engine.now_s
        host.count_run(host.end_s)
        self._withdraw(host, lost=False)

    def fail_host(self, host: HostJob) -> None:
        """A host job dies; it is requeued and goes on from its last checkpoint."""
        now_s = self.engine.now_s
        host.count_run(now_s)
        self._withdraw(host, lost=True)
        left_s = host.lose_work(now_s)
        host.start_s = -1.0
        self.engine.requeue(host.job, left_s)

    def _withdraw(self, host: HostJob, *, lost: bool) -> None:
        slots = host.slots
        host.withdraw_slots(self.engine.now_s)
        for slot in slots:
            bundle = self._on_slot.get(slot.id)
            if bundle is not None:
                self._end_bundle(bundle, lost=lost)
            del self._slots[slot.id], self._host_of[slot.id]
        if slots:
            self._request_decision()

    # --- studies ---------------------------------------------------------------------------------------------------

    def _submit_study(self, study: Study) -> None:
        if study.config.exclusive_devices:
            infinity = float("inf")
            study.job = self.engine.submit(infinity, infinity, study.config.exclusive_devices, study.partition)
            self.engine.on_start[study.job] = lambda _job: self._own_slots(study)
        self.engine.call_at(
            self.engine.now_s + self.scenario.overheads.study_start_s, lambda: self._study_started(study)
        )

    def _study_started(self, study: Study) -> None:
        study.last_held_s = self.engine.now_s
        self._active[study.id] = study
        self._request_decision()

    def _own_slots(self, study: Study) -> None:
        device_type = self.scenario.partitions[study.partition].device_type
        study.own_slots = study.config.exclusive_devices
        for number in range(study.own_slots):
            name = f"{study.id}.own.{number}"
            self._slots[name] = Slot(id=name, kind="own", study=study.id, device_type=device_type)
        self._request_decision()

    def fail_study_job(self, study: Study) -> None:
        """A node under a study's exclusive devices dies: its job is requeued, its bundles there are lost."""
        for number in range(study.own_slots):
            name = f"{study.id}.own.{number}"
            if name in self._on_slot:
                self._end_bundle(self._on_slot[name], lost=True)
            del self._slots[name]
        study.own_slots = 0
        study.exclusive_device_s += study.config.exclusive_devices * (
            self.engine.now_s - self.engine.jobs.start_s[study.job]
        )
        self.engine.requeue(study.job, float("inf"))

    def _study_advanced(self, study: Study) -> None:
        if study.search_done and not study.verifying:
            study.begin_verification()
        elif not study.verifying and self.scenario.policy.eager_transfer and study.config.top_k:
            self._transfer(study)
        if study.done and study.end_s < 0:
            study.end_s = self.engine.now_s + self.scenario.overheads.study_end_s
            del self._active[study.id]
            self.engine.call_at(study.end_s, lambda: self._study_ended(study))

    def _transfer(self, study: Study) -> None:
        """Start the best so far on the target when an exclusive device has nothing to do."""
        running = [
            trial for trial in study.verified.values() if trial.state == RUNNING or trial in study.verify_waiting
        ]
        current = min(running, key=lambda trial: trial.value, default=None)
        idle = any(
            f"{study.id}.own.{number}" in self._slots and f"{study.id}.own.{number}" not in self._on_slot
            for number in range(study.own_slots)
        )
        decision = eager_transfer(
            study.num_ended,
            len(study.trials),
            study.best,
            None if current is None else Candidate(current.number, current.value),
            0.0 if current is None else current.steps / current.rungs[-1],
            idle and not study.waiting,
            self.scenario.policy.transfer,
        )
        if decision is None or decision.start in study.verified:
            return
        if decision.stop is not None:
            stopped = study.verified[decision.stop]
            for bundle in [bundle for bundle in self.bundles.values() if stopped in bundle.lanes]:
                self._end_bundle(bundle, lost=False)
            if stopped in study.verify_waiting:
                study.verify_waiting.remove(stopped)
            del study.verified[decision.stop]
        study.add_to_target(decision.start)
        self._request_decision()

    def _study_ended(self, study: Study) -> None:
        for bundle in [bundle for bundle in self.bundles.values() if bundle.study is study]:
            self._end_bundle(bundle, lost=False)
        jobs = self.engine.jobs
        if study.job >= 0:
            if study.own_slots:
                for number in range(study.own_slots):
                    del self._slots[f"{study.id}.own.{number}"]
                study.exclusive_device_s += study.own_slots * (self.engine.now_s - jobs.start_s[study.job])
                study.own_slots = 0
                self.engine.finish(study.job)
            else:
                del self.engine.on_start[study.job]
                self.engine.partitions[study.partition].withdraw(study.job)
        self._request_decision()

    # --- decisions -------------------------------------------------------------------------------------------------

    def _request_decision(self) -> None:
        if not self._decision_due:
            self._decision_due = True
            self.engine.call_at(self.decider.next_s(self.engine.now_s), self._decide)

    def _decide(self) -> None:
        self._decision_due = False
        now_s = self.engine.now_s
        for bundle in self.bundles.values():
            bundle.advance(now_s)
        studies = self._active.values()
        running: dict[str, int] = dict.fromkeys(self._active, 0)
        for bundle in self.bundles.values():
            if bundle.study.id in running:
                running[bundle.study.id] += 1
        demands = [demand for study in studies for demand in self._demands(study, now_s, bool(running[study.id]))]
        bundles = [
            bundle.describe(now_s, with_remaining=not bundle.study.waiting and not bundle.study.verify_waiting)
            for bundle in self.bundles.values()
        ]
        plan = self.decider.decide(now_s, demands, self._timed_slots(now_s), bundles, self._users())
        for finish in plan.finishes:
            self._finish(finish)
        for refill in plan.refills:
            self._refill(refill)
        for launch in plan.launches:
            self._launch(launch)
        for bundle in [bundle for bundle in self.bundles.values() if not bundle.lanes and not bundle.finishing]:
            self._left(bundle)  # it ran dry and gets nothing more
        if plan:
            self._request_decision()  # what has changed may call for more, a period later

    def _demands(self, study: Study, now_s: float, holds: bool) -> list[Demand]:
        waited_s = 0.0 if holds else now_s - study.last_held_s
        curve = study.sizing.curve
        assert curve is not None
        overheads, found = self.scenario.overheads, []
        if not study.search_done:
            piece_s = study.trials[0].rungs[0] / curve.lane_steps_per_s(1) + overheads.launch_s
            found.append(
                Demand(
                    purpose="search",
                    num_waiting=len(study.waiting),
                    sizing=study.sizing,
                    study=study.id,
                    user=study.user,
                    relative_speed=study.config.relative_speed,
                    waited_s=waited_s,
                    piece_s=piece_s,
                )
            )
        if study.verified:
            found.append(
                Demand(
                    purpose="verify",
                    num_waiting=len(study.verify_waiting),
                    sizing=study.target_sizing,
                    study=study.id,
                    user=study.user,
                    promoted=True,
                    relative_speed=study.config.relative_speed,
                    waited_s=waited_s,
                )
            )
        return found

    def _timed_slots(self, now_s: float) -> list[Slot]:
        slots = []
        for name, slot in self._slots.items():
            host = self._host_of.get(name)
            left_s = None if host is None else host.time_left_s(now_s)
            slots.append(slot if left_s is None or left_s > SOON_S else replace(slot, time_left_s=left_s))
        return slots

    def _users(self) -> dict[str, UserShare]:
        users = {}
        for study in self._active.values():
            config = self._weights.get(study.user)
            limit = None if config is None or config.max_slots < 0 else config.max_slots
            users[study.user] = UserShare(
                weight=1.0 if config is None else config.weight,
                max_slots=limit,
                usage_s=self.user_slot_s[study.user],
            )
        return users

    # --- bundles ---------------------------------------------------------------------------------------------------

    def _launch(self, launch: Launch) -> None:
        study, slot = self._active[launch.study], self._slots[launch.slot_id]
        lanes = study.take(launch.purpose, launch.num_lanes)
        if not lanes:
            return
        now_s = self.engine.now_s
        sizing = study.sizing if launch.purpose == "search" else study.target_sizing
        host = self._host_of.get(slot.id)
        self._num_bundles += 1
        study.num_bundles += 1
        bundle = Bundle(
            id=f"b{self._num_bundles:06d}",
            study=study,
            slot=slot,
            host="" if host is None else host.id,
            purpose=launch.purpose,
            sizing=sizing,
            max_lanes=max_fusion_count(slot.free_bytes, sizing),
            start_s=now_s,
            speed=slot.bubble_s_per_s * study.config.relative_speed.get(slot.device_type, 1.0),
            waiting=lanes,
            num_trials=len(lanes),
            updated_s=now_s + self.scenario.overheads.launch_s,
        )
        bundle.admit()
        if study.start_s < 0:
            study.start_s = now_s
        self.bundles[bundle.id] = self._on_slot[slot.id] = bundle
        self._foresee(bundle)

    def _refill(self, refill: Refill) -> None:
        bundle = self.bundles[refill.bundle_id]
        taken = bundle.study.take(bundle.purpose, refill.num_lanes)
        if taken:
            bundle.waiting += taken
            bundle.num_trials += len(taken)
            bundle.admit()
            bundle.stand_still(self.scenario.overheads.refill_s)
            self._foresee(bundle)

    def _finish(self, finish: Finish) -> None:
        bundle = self.bundles[finish.bundle_id]
        if bundle.finishing:
            return
        self.num_moves[finish.reason.partition(" to ")[0]] += 1
        bundle.finishing = True
        bundle.version += 1
        self._when(bundle, self.engine.now_s + self.scenario.overheads.leave_s, lambda: self._left(bundle))

    def _left(self, bundle: Bundle) -> None:
        self._end_bundle(bundle, lost=False)
        self._request_decision()

    def _foresee(self, bundle: Bundle) -> None:
        """Plan the moment at which the next lane reaches its rung."""
        bundle.version += 1
        next_s = bundle.next_rung_s()
        if next_s != float("inf") and not bundle.finishing:
            self._when(bundle, next_s, lambda: self._at_rung(bundle))

    def _when(self, bundle: Bundle, time_s: float, function: Callable[[], None]) -> None:
        version = bundle.version

        def call() -> None:
            if bundle.version == version and bundle.id in self.bundles:
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
        bundle.stand_still(self.scenario.overheads.rung_s / max(bundle.slot.bubble_s_per_s, 1e-9))
        bundle.admit()
        self._study_advanced(study)
        if not bundle.lanes and bundle.id in self.bundles and (study.verifying or self._nothing_for(bundle)):
            self._end_bundle(bundle, lost=False)
        else:
            self._foresee(bundle)
        self._request_decision()

    def _nothing_for(self, bundle: Bundle) -> bool:
        """An empty bundle stays for a refill only if there is something to refill it with."""
        study = bundle.study
        return not (study.waiting if bundle.purpose == "search" else study.verify_waiting)

    def _end_bundle(self, bundle: Bundle, *, lost: bool) -> None:
        now_s, study = self.engine.now_s, bundle.study
        bundle.advance(now_s)
        del self.bundles[bundle.id], self._on_slot[bundle.slot.id]
        every_s = self.scenario.overheads.checkpoint_every_s
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

    def close(self) -> None:
        """The simulation is over: what still runs is recorded up to now."""
        for bundle in list(self.bundles.values()):
            self._end_bundle(bundle, lost=False)
        for host in self.hosts:
            if host.offering_since_s >= 0:
                host.withdraw_slots(self.engine.now_s)
