"""What Slurm says about jobs, steps, nodes and partitions, typed; and what is asked of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ENDED_JOB_STATES = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)
"""States that a job does not leave again (a requeued one shows as PENDING, not as one of these)."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as slurmctld knows it. Times in seconds since the epoch; null where Slurm says none."""

    job_id: int
    name: str
    user: str
    state: str
    """As Slurm spells it: PENDING, RUNNING, COMPLETING, COMPLETED, ..."""
    partition: str
    nodes: tuple[str, ...]
    """The allocated nodes, in Slurm's order; empty while it waits."""
    num_nodes: int
    num_cpus: int
    comment: str
    submit_time_s: float | None
    start_time_s: float | None
    """For a pending job: when Slurm expects to start it, if it does."""
    end_time_s: float | None
    """For a running job: when its time limit ends, if it has one."""
    time_limit_s: float | None
    """Null: unlimited."""
    work_dir: str
    reason: str
    """Why it waits, or why it failed; `None` where Slurm says so."""
    exit_code: int | None = None
    """Of an ended job: its exit status, or 128 plus the number of the signal that ended it."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED_JOB_STATES


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step that runs now."""

    job_id: int
    step_id: str
    """As Slurm writes it: `41.3`, `41.batch`."""
    name: str
    state: str
    nodes: tuple[str, ...]
    num_tasks: int


@dataclass(frozen=True, kw_only=True)
class Node:
    name: str
    state: str
    """As Slurm spells it, without flags: IDLE, ALLOCATED, MIXED, DOWN, DRAINED, ..."""
    cpus: int
    memory_mib: int
    gres: str
    """As Slurm writes it: `gpu:2`; empty where there is none."""
    partitions: tuple[str, ...]
    responding: bool = True
    """False while slurmctld has lost touch with it, whatever its state."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    name: str
    state: str
    """UP, DOWN, DRAIN or INACTIVE."""
    nodes: tuple[str, ...]
    default: bool
    time_limit_s: float | None
    """Longest time limit; null: unlimited."""


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """A batch job to submit: a command, or a whole script."""

    argv: Sequence[str] = ()
    script: str = ""
    """Text of a batch script (with its `#!` line); instead of `argv`."""
    name: str = ""
    nodes: int | None = None
    ntasks_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_mib: int | None = None
    """Per node."""
    time_limit_s: float | None = None
    comment: str = ""
    output: Path | str | None = None
    """Where stdout and stderr go; `%j` and the like are filled in by Slurm."""
    partition: str = ""
    node_list: Sequence[str] = ()
    gres: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    """Further variables for the job's environment."""
    extra_options: Sequence[str] = ()
    """Further options of sbatch, as it takes them."""
    work_dir: Path | str | None = None
    requeue: bool | None = None
    """Whether Slurm may run it again from the start; null: the cluster's default."""


@dataclass(frozen=True, kw_only=True)
class StepRequest:
    """A step to run inside a running job, beside what the job runs already."""

    job_id: int
    node: str
    argv: Sequence[str]
    name: str = ""
    mem_mib: int | None = None
    cpus_per_task: int | None = None
    """Null: what srun gives a step that asks for nothing."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Further variables for the step's environment."""
    output: Path | str | None = None
    """File for the step's stdout and stderr, appended to; taken literally. Null: thrown away."""
    work_dir: Path | str | None = None
    extra_options: Sequence[str] = ()
    """Further options of srun, as it takes them."""
