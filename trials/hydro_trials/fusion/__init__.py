"""Trains many lanes of one model as one program."""

from hydro_trials.fusion.trainer import FusedTrainer, Lane, LaneState

__all__ = ["FusedTrainer", "Lane", "LaneState"]
