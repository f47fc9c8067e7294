"""Lanes to measure and warm up with: the study's model and data, settings from the middle of its search space."""

from __future__ import annotations

import logging
import math
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

from hydro_trials.fusion import FusedTrainer
from hydro_trials.hyperparameters import resolve_hyperparameters

logger = logging.getLogger(__name__)

NUM_WARM_UP_STEPS = 3


def fill_trainer(trainer: FusedTrainer, num_lanes: int) -> None:
    """Replace the trainer's lanes by `num_lanes` new ones."""
    study = trainer.study
    params = {name: _middle(distribution) for name, distribution in study.space.items()}
    values = resolve_hyperparameters(study.optimizer, study.schedule, study.fixed, params)
    trainer.drop(trainer.trials)
    for trial in range(num_lanes):
        trainer.admit(trial, trial, values)


def warm_up(trainer: FusedTrainer, num_lanes: int) -> None:
    """Train for a moment and leave no lane: first uses are slow, and here no gate is waiting for them.

    Whatever goes wrong is left for the training itself to find, which can say whom it concerns.
    """
    check = trainer.check
    trainer.set_check(lambda site: None)
    try:
        fill_trainer(trainer, num_lanes)
        for _ in range(NUM_WARM_UP_STEPS):
            trainer.step()
        trainer.evaluate(trainer.trials)
        trainer.state(0)
    except Exception as error:
        logger.info("warm-up broke off: %s", error)
    finally:
        trainer.drop(trainer.trials)
        trainer.set_check(check)


def _middle(distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    low, high = getattr(distribution, "low"), getattr(distribution, "high")  # noqa: B009
    if getattr(distribution, "log", False):
        return math.exp((math.log(low) + math.log(high)) / 2)
    return low if isinstance(low, int) else (low + high) / 2
