"""The second half of a study: the best configurations of the surrogate are trained on the target model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Optional

from hydro_slurm import formats
from hydro_slurm.model import COMPLETE, FAIL, RUNNING, LaneSpec, TrialResult
from hydro_slurm.study.grouping import Group, take_alike

MAX_LOSSES = 3
FILE_NAME = "verified.json"


@dataclass(frozen=True)
class VerifiedTrial:
    """One configuration on the target, beside what the surrogate said of it."""

    trial: int
    params: dict[str, Any]
    surrogate_value: float
    target_value: Optional[float]
    state: str
    metrics: dict[str, Optional[float]] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class VerificationRecord:
    """`verified.json`: the configurations that are verified, in the surrogate's order, and what came out so far."""

    FORMAT: ClassVar[str] = "hydro.verified"
    VERSION: ClassVar[int] = 1

    candidates: tuple[VerifiedTrial, ...]


class Verification:
    """Trains the given configurations on the target; survives restarts through its file."""

    def __init__(
        self,
        path: Path,
        candidates: Sequence[VerifiedTrial],
        lanes: Sequence[LaneSpec],
        separates: Sequence[str] = (),
    ) -> None:
        self._path, self._separates = path, separates
        if path.exists():
            candidates = formats.read_record(VerificationRecord, path).candidates
        self._candidates = {candidate.trial: candidate for candidate in candidates}
        self._lanes = {lane.trial: lane for lane in lanes if lane.trial in self._candidates}
        self._waiting = [trial for trial, found in self._candidates.items() if found.state == RUNNING]
        self._running: set[int] = set()
        self._losses: dict[int, int] = {}
        self._save()

    @property
    def num_waiting(self) -> int:
        """Configurations that wait for a lane."""
        return len(self._waiting)

    @property
    def finished(self) -> bool:
        """Whether every configuration has ended."""
        return not self._waiting and not self._running

    def take(self, count: int, group: Group | None = None) -> list[LaneSpec]:
        """Up to `count` configurations that may share a bundle; see `Search.take`."""
        waiting = deque(self._lanes[trial] for trial in self._waiting)
        lanes = take_alike(waiting, count, self._separates, group)
        self._waiting = [lane.trial for lane in waiting]
        self._running.update(lane.trial for lane in lanes)
        return lanes

    def give_back(self, trials: Iterable[int], checkpoints: dict[int, str] | None = None, *, lost: bool = True) -> None:
        """Put configurations back to waiting because their bundle has ended."""
        for trial in sorted(set(trials) & self._running):
            self._running.discard(trial)
            self._losses[trial] = self._losses.get(trial, 0) + lost
            if self._losses[trial] >= MAX_LOSSES:
                self._settle(trial, None, FAIL, {}, f"its bundle died {MAX_LOSSES} times")
                continue
            if checkpoints and trial in checkpoints:
                lane = self._lanes[trial]
                self._lanes[trial] = LaneSpec(lane.trial, lane.params, lane.seed, checkpoints[trial])
            self._waiting.append(trial)

    def set_checkpoints(self, checkpoints: dict[int, str]) -> None:
        """Tell waiting configurations where to go on from (after a restart of the controller)."""
        for trial in set(checkpoints) & set(self._waiting):
            lane = self._lanes[trial]
            self._lanes[trial] = LaneSpec(lane.trial, lane.params, lane.seed, checkpoints[trial])

    def record(self, results: Sequence[TrialResult]) -> list[int]:
        """Take in evaluations and ends; nothing is pruned here."""
        for result in results:
            candidate = self._candidates.get(result.trial)
            if candidate is None or candidate.state != RUNNING or result.state == RUNNING:
                continue
            self._running.discard(result.trial)
            if result.trial in self._waiting:
                self._waiting.remove(result.trial)
            self._settle(result.trial, result.value, result.state, result.metrics, result.reason)
        return []

    def results(self, direction: str) -> list[VerifiedTrial]:
        """All configurations, the best on the target first, those without a value last."""
        sign = 1.0 if direction == "minimize" else -1.0
        return sorted(
            self._candidates.values(),
            key=lambda c: (
                c.state != COMPLETE,
                sign * (c.target_value or 0.0),
                c.trial,
            ),
        )

    def _settle(
        self, trial: int, value: float | None, state: str, metrics: dict[str, float | None], reason: str
    ) -> None:
        old = self._candidates[trial]
        self._candidates[trial] = VerifiedTrial(
            trial, old.params, old.surrogate_value, value, state, dict(metrics), reason
        )
        self._save()

    def _save(self) -> None:
        formats.write_record(self._path, VerificationRecord(tuple(self._candidates.values())))
