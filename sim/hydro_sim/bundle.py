"""A running bundle: lanes that advance in lockstep at the speed of its slot and fusion count."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydro_sim.studies import Study, Trial
from hydro_slurm.policy import RunningBundle, SizingPolicy, Slot


@dataclass(slots=True)
class Bundle:
    """One bundle on one slot. `advance` brings it up to a moment; what it holds changes in between only."""

    id: str
    study: Study
    slot: Slot
    host: str
    purpose: str
    sizing: SizingPolicy
    max_lanes: int
    start_s: float
    """When its slot was taken."""
    speed: float
    """Throughput relative to a device of its own."""
    lanes: list[Trial] = field(default_factory=list)
    waiting: list[Trial] = field(default_factory=list)
    """Trials handed to it that wait for a free lane."""
    updated_s: float = 0.0
    """Up to when its lanes' steps are counted; in the future while it starts or stands still."""
    finishing: bool = False
    version: int = 0
    """Counts changes; an event that was foreseen for an earlier version is void."""
    busy_s: float = 0.0
    """Wall-clock time in which its lanes could compute."""
    lane_steps: float = 0.0
    max_num_lanes: int = 0
    num_trials: int = 0
    """Trials that were handed to it."""

    def steps_per_s(self) -> float:
        """Of each lane."""
        if not self.lanes or self.sizing.curve is None:
            return 0.0
        return self.speed * self.sizing.curve.lane_steps_per_s(len(self.lanes)) / len(self.lanes)

    def advance(self, now_s: float) -> None:
        """Count the steps up to now."""
        if now_s <= self.updated_s:
            return
        if self.lanes:
            span_s = now_s - self.updated_s
            steps = span_s * self.steps_per_s()
            for trial in self.lanes:
                trial.steps += steps
            self.lane_steps += steps * len(self.lanes)
            self.busy_s += span_s
        self.updated_s = now_s

    def admit(self) -> None:
        """Fill free lanes from what waits inside."""
        while self.waiting and len(self.lanes) < self.max_lanes:
            self.lanes.append(self.waiting.pop(0))
        self.max_num_lanes = max(self.max_num_lanes, len(self.lanes))

    def next_rung_s(self) -> float:
        """When the first of its lanes reaches its rung, if nothing changes."""
        rate = self.steps_per_s()
        if rate <= 0:
            return float("inf")
        return self.updated_s + max(min(trial.steps_to_rung for trial in self.lanes), 0.0) / rate

    def stand_still(self, seconds: float) -> None:
        """Evaluate, checkpoint or take trials in: no steps for a while."""
        self.updated_s += seconds

    def describe(self, now_s: float, *, with_remaining: bool) -> RunningBundle:
        """What the policy sees."""
        remaining_s = None
        rate = self.steps_per_s()
        if with_remaining and rate > 0 and not self.waiting:
            left = max(trial.rungs[-1] - trial.steps for trial in self.lanes)
            remaining_s = max(left, 0.0) / rate + max(self.updated_s - now_s, 0.0)
        return RunningBundle(
            id=self.id,
            slot_id=self.slot.id,
            purpose=self.purpose,
            num_lanes=len(self.lanes),
            num_waiting=len(self.waiting),
            max_lanes=self.max_lanes,
            finishing=self.finishing,
            study=self.study.id,
            user=self.study.user,
            remaining_s=remaining_s,
        )
