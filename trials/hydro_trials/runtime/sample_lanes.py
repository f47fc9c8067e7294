"""Lanes to measure and warm up with: the study's model and data, settings from the middle of its search space."""

from __future__ import annotations

import math
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

from hydro_trials.fusion import FusedTrainer
from hydro_trials.hyperparameters import resolve_hyperparameters


def fill_trainer(trainer: FusedTrainer, num_lanes: int) -> None:
    """Replace the trainer's lanes by `num_lanes` new ones."""
    study = trainer.study
    params = {name: _middle(distribution) for name, distribution in study.space.items()}
    values = resolve_hyperparameters(study.optimizer, study.schedule, study.fixed, params)
    trainer.drop(trainer.trials)
    for trial in range(num_lanes):
        trainer.admit(trial, trial, values)


def _middle(distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    low, high = getattr(distribution, "low"), getattr(distribution, "high")  # noqa: B009
    if getattr(distribution, "log", False):
        return math.exp((math.log(low) + math.log(high)) / 2)
    return low if isinstance(low, int) else (low + high) / 2
