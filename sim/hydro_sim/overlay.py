"""Hosts, bundles and studies on top of the base load, with the daemon's own policy deciding."""

from __future__ import annotations

from dataclasses import replace

from hydro_sim.engine import Engine
from hydro_sim.host_jobs import HostJob
from hydro_sim.running import RunningBundles
from hydro_sim.settings import Scenario
from hydro_sim.studies import Study
from hydro_slurm.model import RUNNING
from hydro_slurm.policy import (
    Candidate,
    Decider,
    Demand,
    Slot,
    UserShare,
    eager_transfer,
)

SOON_S = 3600.0
"""Time left to a host's limit is told to the policy from here on; before, it decides nothing."""


class Overlay:
    """Puts hosts and studies into an engine and runs them."""

    def __init__(self, engine: Engine, scenario: Scenario, hosts: list[HostJob], studies: list[Study]) -> None:
        self.engine, self.scenario, self.hosts = engine, scenario, hosts
        self.studies = {study.id: study for study in studies}
        self.running = RunningBundles(engine, scenario.overheads, self._study_advanced, self._request_decision)
        self.decider = Decider(scenario.overheads.poll_s, scenario.policy.moves)
        self._active: dict[str, Study] = {}
        self._slots: dict[str, Slot] = {}
        self._host_of: dict[str, HostJob] = {}
        self._decision_due = False
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
            bundle = self.running.on_slot.get(slot.id)
            if bundle is not None:
                self.running.end(bundle, lost=lost)
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
            if name in self.running.on_slot:
                self.running.end(self.running.on_slot[name], lost=True)
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
            f"{study.id}.own.{number}" in self._slots and f"{study.id}.own.{number}" not in self.running.on_slot
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
            for bundle in [bundle for bundle in self.running.by_id.values() if stopped in bundle.lanes]:
                self.running.end(bundle, lost=False)
            if stopped in study.verify_waiting:
                study.verify_waiting.remove(stopped)
            del study.verified[decision.stop]
        study.add_to_target(decision.start)
        self._request_decision()

    def _study_ended(self, study: Study) -> None:
        for bundle in self.running.of(study):
            self.running.end(bundle, lost=False)
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
        self.running.advance()
        studies = self._active.values()
        running: dict[str, int] = dict.fromkeys(self._active, 0)
        for bundle in self.running.by_id.values():
            if bundle.study.id in running:
                running[bundle.study.id] += 1
        demands = [demand for study in studies for demand in self._demands(study, now_s, bool(running[study.id]))]
        bundles = [
            bundle.describe(now_s, with_remaining=not bundle.study.waiting and not bundle.study.verify_waiting)
            for bundle in self.running.by_id.values()
        ]
        plan = self.decider.decide(now_s, demands, self._timed_slots(now_s), bundles, self._users())
        hosts = {name: host.id for name, host in self._host_of.items()} if plan.launches else {}
        self.running.apply(plan, self._slots, hosts, self._active)
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
                usage_s=self.running.user_slot_s[study.user],
            )
        return users

    def close(self) -> None:
        """The simulation is over: what still runs is recorded up to now."""
        for bundle in list(self.running.by_id.values()):
            self.running.end(bundle, lost=False)
        for host in self.hosts:
            if host.offering_since_s >= 0:
                host.withdraw_slots(self.engine.now_s)
