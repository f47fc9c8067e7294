"""Studies: trials, rungs, pruning and verification, without a clock."""

from __future__ import annotations

import random
from bisect import insort
from collections import deque
from dataclasses import dataclass, field

from hydro_sim.settings import StudyConfig
from hydro_slurm.model import COMPLETE, PRUNED, RUNNING, WAITING
from hydro_slurm.policy import Candidate, SizingPolicy


@dataclass(slots=True)
class Trial:
    """One trial of a search, or one configuration on the target (purpose "verify")."""

    number: int
    purpose: str
    value: float
    """The objective that it will reach; smaller is better. Drawn, for a simulator trains nothing."""
    rungs: tuple[float, ...]
    """Steps at which it is evaluated; the last one is its budget."""
    steps: float = 0.0
    next_rung: int = 0
    state: str = WAITING
    end_s: float = -1.0

    @property
    def steps_to_rung(self) -> float:
        return self.rungs[self.next_rung] - self.steps


@dataclass(slots=True)
class Study:
    """State of one study."""

    id: str
    user: str
    config: StudyConfig
    submit_s: float
    sizing: SizingPolicy
    target_sizing: SizingPolicy
    trials: list[Trial]
    waiting: deque[Trial] = field(default_factory=deque)
    verify_waiting: deque[Trial] = field(default_factory=deque)
    verified: dict[int, Trial] = field(default_factory=dict)
    verifying: bool = False
    """The search is over, and what is verified is settled."""
    values_at_rung: list[list[float]] = field(default_factory=list)
    num_ended: int = 0
    best: Candidate | None = None
    start_s: float = -1.0
    """When its first bundle started."""
    end_s: float = -1.0
    last_held_s: float = 0.0
    partition: int = 0
    job: int = -1
    """Its job with exclusive devices, if it has any."""
    own_slots: int = 0
    """Exclusive devices that it holds now."""
    exclusive_device_s: float = 0.0
    bubble_device_s: float = 0.0
    """Device-seconds of work that were done in bubbles, as seconds of a device of its own."""
    num_bundles: int = 0
    lane_steps: float = 0.0

    @property
    def search_done(self) -> bool:
        return self.num_ended == len(self.trials)

    @property
    def done(self) -> bool:
        return self.verifying and all(trial.state == COMPLETE for trial in self.verified.values())

    def take(self, purpose: str, count: int) -> list[Trial]:
        """Up to `count` trials for a bundle."""
        queue = self.waiting if purpose == "search" else self.verify_waiting
        taken = [queue.popleft() for _ in range(min(count, len(queue)))]
        for trial in taken:
            trial.state = RUNNING
        return taken

    def give_back(self, trial: Trial, lost_steps: float) -> None:
        """A trial's bundle has left: it waits again, and has lost the steps since its last checkpoint."""
        floor = trial.rungs[trial.next_rung - 1] if trial.next_rung else 0.0
        trial.steps = max(trial.steps - lost_steps, floor)
        trial.state = WAITING
        (self.waiting if trial.purpose == "search" else self.verify_waiting).append(trial)

    def reach_rung(self, trial: Trial, now_s: float) -> bool:
        """A trial is evaluated at its rung. Returns whether it goes on."""
        trial.steps = trial.rungs[trial.next_rung]
        rung = trial.next_rung
        trial.next_rung += 1
        is_last = trial.next_rung == len(trial.rungs)
        if trial.purpose == "search" and not is_last and self.config.eta:
            values = self.values_at_rung[rung]
            insort(values, trial.value)
            num_kept = max(len(values) // self.config.eta, 1)
            if trial.value > values[num_kept - 1]:
                self._end(trial, PRUNED, now_s)
                return False
        if is_last:
            self._end(trial, COMPLETE, now_s)
        return not is_last

    def begin_verification(self) -> None:
        """The best trials go to the target; those that eager transfer has brought there already stay."""
        self.verifying = True
        complete = sorted(
            (trial for trial in self.trials if trial.state == COMPLETE), key=lambda trial: (trial.value, trial.number)
        )
        for trial in complete[: self.config.top_k]:
            if trial.number not in self.verified:
                self.add_to_target(trial.number)

    def add_to_target(self, number: int) -> None:
        """One configuration waits for the target."""
        source = self.trials[number]
        trial = Trial(number, "verify", source.value, (float(self.config.target_steps),))
        self.verified[number] = trial
        self.verify_waiting.append(trial)

    def _end(self, trial: Trial, state: str, now_s: float) -> None:
        trial.state, trial.end_s = state, now_s
        if trial.purpose != "search":
            return
        self.num_ended += 1
        if state == COMPLETE and (self.best is None or trial.value < self.best.value):
            self.best = Candidate(trial.number, trial.value)


def make_studies(
    config: StudyConfig, sizing: SizingPolicy, target: SizingPolicy, partition: int, seed: str
) -> list[Study]:
    """The studies of one group, with their submit times and trials drawn."""
    draw = random.Random(seed)
    studies = []
    for number in range(config.count):
        submit_s = (config.submit_h + (draw.uniform(0, config.over_h) if number and config.over_h else 0.0)) * 3600
        rungs = tuple(share * config.steps for share in config.rungs)
        trials = [Trial(i, "search", draw.random(), rungs) for i in range(config.trials)]
        study = Study(
            id=config.name if config.count == 1 else f"{config.name}-{number:03d}",
            user=config.user.replace("{n}", str(number)),
            config=config,
            submit_s=submit_s,
            sizing=sizing,
            target_sizing=target,
            trials=trials,
            waiting=deque(trials),
            values_at_rung=[[] for _ in rungs],
            partition=partition,
        )
        studies.append(study)
    return studies
