"""Pure decisions: what runs where. No I/O, no wall clock; the daemon and the simulator run the same code."""

from hydro_slurm.policy.placement import Demand, Finish, Launch, Plan, Refill, RunningBundle, Slot, place
from hydro_slurm.policy.sizing import SizingPolicy, fusion_count

__all__ = [
    "Demand",
    "Finish",
    "Launch",
    "Plan",
    "Refill",
    "RunningBundle",
    "SizingPolicy",
    "Slot",
    "fusion_count",
    "place",
]
