"""Trains many lanes of one model as one program."""

from hydro_trials.fusion.lanes import Lane, LaneState
from hydro_trials.fusion.trainer import FusedTrainer

__all__ = ["FusedTrainer", "Lane", "LaneState"]
