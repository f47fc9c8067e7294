"""First uses are slow; they happen here, where no gate waits for them."""

from __future__ import annotations

import logging

from hydro_trials.fusion import FusedTrainer
from hydro_trials.runtime.plan import LanePlan
from hydro_trials.runtime.sample_lanes import fill_trainer

logger = logging.getLogger(__name__)

NUM_WARM_UP_STEPS = 3


def warm_up(trainer: FusedTrainer, plan: LanePlan, num_lanes: int) -> None:
    """Train for a moment and leave no lane: first uses are slow, and here no gate is waiting for them.

    Whatever goes wrong is left for the training itself to find, which can say whom it concerns.
    """
    check = trainer.check
    trainer.set_check(lambda site: None)
    try:
        fill_trainer(trainer, num_lanes)
        plan.apply(trainer)
        for _ in range(NUM_WARM_UP_STEPS):
            trainer.step()
        trainer.evaluate(trainer.trials)
        trainer.state(0)
    except Exception as error:
        logger.info("warm-up broke off: %s", error)
    finally:
        trainer.drop(trainer.trials)
        trainer.set_check(check)
