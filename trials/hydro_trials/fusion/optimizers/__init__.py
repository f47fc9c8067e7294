"""Optimizers of many lanes at once: every hyperparameter is a tensor with one value per lane.

They compute what torch.optim computes for each lane alone (tested in float64), Lion what Chen et al. (2023) publish.
State lies in flat matrices like the parameters', so a lane keeps its state when others leave.

What is computed at all is decided by the study (which hyperparameters it may use), not by the lanes that happen to be
there: so a lane's numbers, bit for bit, do not depend on the others.
"""

from hydro_trials.fusion.optimizers.clipping import clip_gradients
from hydro_trials.fusion.optimizers.fused import SEGMENT_VALUES, FusedOptimizer, slot_names
from hydro_trials.fusion.optimizers.piece import LaneSettings

__all__ = ["SEGMENT_VALUES", "FusedOptimizer", "LaneSettings", "clip_gradients", "slot_names"]
