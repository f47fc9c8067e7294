"""Measures what lanes cost and chooses how many are fused, and how they are run."""

from hydro_trials.planner.choice import choose_point, knee, most_lanes
from hydro_trials.planner.profiler import Limits, Profiler, device_name, profile_key

__all__ = ["Limits", "Profiler", "choose_point", "device_name", "knee", "most_lanes", "profile_key"]
