"""Pure decisions: what runs where. No I/O, no wall clock; the daemon and the simulator run the same code."""

from hydro_slurm.policy.allocation import Claim, SlotClass, allocate
from hydro_slurm.policy.hosts import HostOffer, HostPolicy, why_not
from hydro_slurm.policy.incremental import Decider
from hydro_slurm.policy.moves import MovePolicy
from hydro_slurm.policy.placement import place
from hydro_slurm.policy.sizing import SizingPolicy, ThroughputCurve, max_fusion_count
from hydro_slurm.policy.transfer import Candidate, Supersede, TransferPolicy, eager_transfer
from hydro_slurm.policy.world import Demand, Finish, Launch, Plan, Refill, RunningBundle, Slot, UserShare

__all__ = [
    "Candidate",
    "Claim",
    "Decider",
    "Demand",
    "Finish",
    "HostOffer",
    "HostPolicy",
    "Launch",
    "MovePolicy",
    "Plan",
    "Refill",
    "RunningBundle",
    "SizingPolicy",
    "Slot",
    "SlotClass",
    "Supersede",
    "ThroughputCurve",
    "TransferPolicy",
    "UserShare",
    "allocate",
    "eager_transfer",
    "max_fusion_count",
    "place",
    "why_not",
]
