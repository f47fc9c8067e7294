"""The boundary to Slurm: a client protocol with typed results, and clients that implement it."""

from hydro_slurm.slurm.client import SlurmClient, StepProcess
from hydro_slurm.slurm.command_line import CommandLineClient
from hydro_slurm.slurm.fake import FakeSlurmClient
from hydro_slurm.slurm.records import ENDED_JOB_STATES, BatchRequest, Job, Node, Partition, Step, StepRequest

__all__ = [
    "ENDED_JOB_STATES",
    "BatchRequest",
    "CommandLineClient",
    "FakeSlurmClient",
    "Job",
    "Node",
    "Partition",
    "SlurmClient",
    "Step",
    "StepProcess",
    "StepRequest",
]
