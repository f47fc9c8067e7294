"""How a bundle runs its lanes: what the study's profile of this device says, or else a profile made now."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from hydro_slurm import formats
from hydro_slurm.errors import FormatError, HydroError, PlannerError
from hydro_slurm.model import BundleSpec, Profile
from hydro_trials.fusion import FusedTrainer
from hydro_trials.fusion.program import GENERAL, SEPARATE
from hydro_trials.planner import Limits, Profiler, choose_point, most_lanes, profile_key

logger = logging.getLogger(__name__)

BUDGET_S = 3.0
"""Time that a bundle spends on a profile of its own, where the study has none of this device."""


class LanePlan:
    """Chooses, for each fusion count, the way of running lanes that measured fastest."""

    def __init__(self, profile: Profile | None, quantum_ms: float | None = None) -> None:
        self._profile, self._quantum_ms = profile, quantum_ms
        self._points = [*profile.points, *profile.others] if profile else []
        self._proven = {GENERAL, SEPARATE}

    def most_lanes(self, spec: BundleSpec) -> int:
        """How many lanes the bundle may fuse: what it was given, or fewer where its cap or quantum asks for that."""
        found = most_lanes(self._points, spec.memory_cap_bytes, self._quantum_ms)
        return spec.max_lanes if found is None else min(spec.max_lanes, found)

    @classmethod
    def of(cls, make_trainer: Callable[[], FusedTrainer], spec: BundleSpec) -> LanePlan:
        """By the study's profile of this model on this device.

        Without one, a bundle in the study's own allocation measures for a moment and leaves the profile there. In a
        host's bubbles nothing is measured, because no gate cuts that into quanta: lanes are run the general way.
        """
        directory = Path(spec.study_dir) / "profiles"
        trainer = make_trainer()
        path = directory / f"{profile_key(trainer)}.json"
        try:
            return cls(formats.read_record(Profile, path), spec.quantum_ms)
        except FileNotFoundError:
            pass
        except (FormatError, OSError) as error:
            logger.warning("the study's profile is made anew: %s", error)
        if spec.slot.kind == "bubble":
            return cls(None)
        limits = Limits(
            max_lanes=spec.max_lanes,
            cap_bytes=spec.memory_cap_bytes,
            quantum_ms=spec.quantum_ms,
            budget_s=BUDGET_S,
            factor=4,
            num_steps=spec.rungs[-1] if trainer.study.compile else 0,
        )
        try:
            profile = Profiler(make_trainer, limits).run()
        except PlannerError as error:
            logger.warning("%s; one lane at a time is tried", error)
            return cls(None)
        except Exception as error:  # the training itself will find it, and can say whom it concerns
            logger.info("profiling broke off: %s", error)
            return cls(None)
        try:
            directory.mkdir(exist_ok=True)
            formats.write_record(path, profile)
        except OSError as error:
            logger.warning("cannot keep the profile: %s", error)
        return cls(profile, spec.quantum_ms)

    def apply(self, trainer: FusedTrainer) -> None:
        """Have the trainer run its present lanes the best way."""
        if trainer.refusal is not None or not trainer.lanes:
            return
        point = choose_point(self._points, len(trainer.lanes), self._quantum_ms)
        if point is None or trainer.is_used(point.kind, point.depth):
            return
        try:
            if point.kind not in self._proven:  # the profile may be of an earlier state of the study file
                trainer.compare(point.kind)
                self._proven.add(point.kind)
            trainer.use(point.kind, depth=point.depth)
        except HydroError as error:
            logger.warning("%d lanes are run another way: %s", len(trainer.lanes), error)
            self._points = [each for each in self._points if each.kind != point.kind]
            trainer.use(GENERAL)
            self.apply(trainer)
