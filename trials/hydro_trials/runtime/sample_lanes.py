"""Lanes to measure and warm up with: the study's model and data, settings from the middle of its search space."""

from __future__ import annotations

import math
import random
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

from hydro_slurm.errors import StudyError
from hydro_trials.fusion import FusedTrainer
from hydro_trials.hyperparameters import resolve_hyperparameters
from hydro_trials.study import Study

NUM_DRAWS = 100


def fill_trainer(trainer: FusedTrainer, num_lanes: int) -> None:
    """Replace the trainer's lanes by `num_lanes` new ones."""
    study = trainer.study
    values = _possible_values(study)
    trainer.drop(trainer.trials)
    for trial in range(num_lanes):
        trainer.admit(trial, trial, values)


def _possible_values(study: Study) -> dict[str, float]:
    """Hyperparameters from the middle of the space; where those exclude each other, from elsewhere in it."""
    draw = random.Random(0)
    params = {name: _middle(distribution) for name, distribution in study.space.items()}
    for _ in range(NUM_DRAWS):
        try:
            return resolve_hyperparameters(study.optimizer, study.schedule, study.fixed, params)
        except StudyError:
            params = {name: _drawn(distribution, draw) for name, distribution in study.space.items()}
    return resolve_hyperparameters(study.optimizer, study.schedule, study.fixed, params)


def _drawn(distribution: BaseDistribution, draw: random.Random) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return draw.choice(distribution.choices)
    low, high = getattr(distribution, "low"), getattr(distribution, "high")  # noqa: B009
    if isinstance(low, int):
        return draw.choice([low, high])
    return draw.choice([low, high, (low + high) / 2])


def _middle(distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    low, high = getattr(distribution, "low"), getattr(distribution, "high")  # noqa: B009
    middle = math.exp((math.log(low) + math.log(high)) / 2) if getattr(distribution, "log", False) else (low + high) / 2
    return round(middle) if isinstance(low, int) else middle
