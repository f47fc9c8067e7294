"""The search of one study: Optuna asks and tells, this module keeps count.

Exactly once: a result is known by (trial, rung). Taking it in again, after a crash of whichever side, changes
nothing; a trial that ends is told to the storage once and its number is never used again.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from hydro_slurm.model import COMPLETE, DIVERGED, FAIL, PRUNED, RUNNING, WAITING, LaneSpec, TrialResult
from hydro_slurm.study.description import StudyDescription
from hydro_slurm.study.grouping import Group, take_alike
from hydro_slurm.study.storage import make_pruner, make_sampler, open_storage

logger = logging.getLogger(__name__)

MAX_LOSSES = 3
"""A trial whose bundle died this often without a rung in between is given up: it may be what kills them."""


class Search:
    """Search space, sampler, pruner and trial states of one study. The only writer of its storage."""

    def __init__(self, description: StudyDescription, directory: Path, separates: Sequence[str] = ()) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.description, self._separates = description, separates
        self._space = description.distributions()
        self._study = optuna.create_study(
            study_name=description.name,
            storage=open_storage(directory),
            sampler=make_sampler(description.sampler, description.seed, description.max_lanes),
            pruner=make_pruner(description.pruner, description.rungs),
            direction=description.direction,
            load_if_exists=True,
        )
        self._waiting: deque[LaneSpec] = deque()
        self._running: dict[int, LaneSpec] = {}
        self._live: dict[int, optuna.trial.Trial] = {}
        self._losses: Counter[int] = Counter()
        self._num_created = 0
        self._reported: set[tuple[int, int]] = set()
        for frozen in self._study.get_trials(deepcopy=False):
            self._num_created += 1
            self._reported.update((frozen.number, step) for step in frozen.intermediate_values)
            if not frozen.state.is_finished():
                trial = optuna.trial.Trial(self._study, frozen._trial_id)
                for name, distribution in self._space.items():
                    # Returns what the storage has; a controller that was cut off in asking left some out.
                    trial._suggest(name, distribution)
                self._live[frozen.number] = trial
                self._waiting.append(self.lane(frozen.number, trial.params))

    @property
    def num_waiting(self) -> int:
        """Trials that could start now: those not created yet, and those that lost their lane."""
        return len(self._waiting) + self.description.trials - self._num_created

    @property
    def finished(self) -> bool:
        """Whether every trial of the study has ended."""
        return self.num_waiting == 0 and not self._running

    def take(self, count: int, group: Group | None = None) -> list[LaneSpec]:
        """Up to `count` trials that may share a bundle: those that lost their lane first, then new ones.

        Args:
            count: How many are wanted.
            group: Of the bundle that they are to join; None for a new bundle.
        """
        lanes = take_alike(self._waiting, count, self._separates, group, self._ask)
        self._running.update((lane.trial, lane) for lane in lanes)
        return lanes

    def give_back(self, trials: Iterable[int], checkpoints: dict[int, str] | None = None, *, lost: bool = True) -> None:
        """Put trials back to WAITING because their bundle has ended, with the newest checkpoint of each.

        Args:
            trials: Numbers; those that have ended or wait already are left alone.
            checkpoints: Newest complete checkpoint by trial number.
            lost: The bundle died (a trial that is lost `MAX_LOSSES` times in a row is given up), or it left in peace.
        """
        for number in sorted(trials):
            lane = self._running.pop(number, None)
            if lane is None:
                continue
            self._losses[number] += lost
            if self._losses[number] >= MAX_LOSSES:
                self._end(number, FAIL, f"its bundle died {MAX_LOSSES} times without finishing a rung")
                continue
            self._waiting.append(replace(lane, checkpoint=(checkpoints or {}).get(number, lane.checkpoint)))

    def record(self, results: Sequence[TrialResult]) -> list[int]:
        """Take in evaluations and ends.

        Results of one batch are judged best first, so that the pruner keeps its share of each rung.

        Returns:
            Numbers of the trials that are pruned now: their lanes are to be stopped.
        """
        sign = 1.0 if self.description.direction == "minimize" else -1.0
        ordered = sorted(
            results, key=lambda r: (r.rung, r.value is None, sign * r.value if r.value is not None else 0.0, r.trial)
        )
        return [result.trial for result in ordered if self._record_one(result)]

    def set_checkpoints(self, checkpoints: dict[int, str]) -> None:
        """Tell waiting trials where to go on from (after a restart of the controller)."""
        self._waiting = deque(
            replace(lane, checkpoint=checkpoints.get(lane.trial, lane.checkpoint)) for lane in self._waiting
        )

    def trials(self) -> list[FrozenTrial]:
        """All trials as the storage has them."""
        return self._study.get_trials(deepcopy=False)

    def top(self, count: int) -> list[FrozenTrial]:
        """The best COMPLETE trials, best first; ties by number."""
        sign = 1.0 if self.description.direction == "minimize" else -1.0
        complete = [trial for trial in self.trials() if trial.state == TrialState.COMPLETE]
        return sorted(complete, key=lambda trial: (sign * (trial.value or 0.0), trial.number))[:count]

    def counts(self) -> dict[str, int]:
        """Number of trials in each state."""
        counts = dict.fromkeys((WAITING, RUNNING, COMPLETE, PRUNED, FAIL, DIVERGED), 0)
        for trial in self.trials():
            if trial.state == TrialState.FAIL:
                counts[trial.user_attrs.get("state", FAIL)] += 1
            elif trial.state.is_finished():
                counts[trial.state.name] += 1
        counts[RUNNING] = len(self._running)
        counts[WAITING] = self.num_waiting
        return counts

    def _ask(self) -> LaneSpec | None:
        if self._num_created >= self.description.trials:
            return None
        trial = self._study.ask(fixed_distributions=self._space)
        self._num_created += 1
        self._live[trial.number] = trial
        return self.lane(trial.number, trial.params)

    def lane(self, number: int, params: dict[str, object]) -> LaneSpec:
        """A trial's configuration, to be trained from the start."""
        seed = self.description.seed * 100_003 + number
        return LaneSpec(trial=number, params={**self.description.fixed, **params}, seed=seed)

    def _record_one(self, result: TrialResult) -> bool:
        """Take in one result. Returns whether the trial is pruned by it."""
        number = result.trial
        trial = self._live.get(number)
        if trial is None:
            return False
        self._losses[number] = 0
        if number in self._running and result.checkpoint:
            self._running[number] = replace(self._running[number], checkpoint=result.checkpoint)
        trial.set_user_attr("lane_seconds", result.lane_seconds)
        if result.state in (DIVERGED, FAIL) or result.value is None:
            self._end(number, DIVERGED if result.state != FAIL else FAIL, result.reason)
            return False
        step = result.step
        if (number, step) not in self._reported:
            self._reported.add((number, step))
            trial.report(result.value, step)
        if result.state == COMPLETE:
            self._end(number, COMPLETE, "", value=result.value)
            return False
        if not trial.should_prune():
            return False
        self._end(number, PRUNED, f"pruned at step {step}")
        return True

    def _end(self, number: int, state: str, reason: str, value: float | None = None) -> None:
        trial = self._live.pop(number)
        self._running.pop(number, None)
        if reason:
            trial.set_user_attr("reason", reason)
        if state in (FAIL, DIVERGED):
            trial.set_user_attr("state", state)
            self._study.tell(number, state=TrialState.FAIL)
        elif state == PRUNED:
            self._study.tell(number, state=TrialState.PRUNED)
        else:
            self._study.tell(number, value)
        logger.info("trial=%d state=%s %s", number, state, reason)
