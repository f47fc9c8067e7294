"""What the rest of hydro_slurm asks of Slurm. `SlurmContract` in the tests says how every client behaves."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from typing import Protocol

from hydro_slurm.slurm.records import ENDED_JOB_STATES, BatchRequest, Job, Node, Partition, Step, StepRequest


class StepProcess(Protocol):
    """A step that this process launched."""

    @property
    def name(self) -> str:
        """The step's name, as `SlurmClient.steps` lists it."""
        ...

    @property
    def pid(self) -> int:
        """The launching command's process (0 where there is none)."""
        ...

    def poll(self) -> int | None:
        """Null while it runs, then its exit status (128 plus the number, if a signal ended it)."""
        ...

    def wait(self, timeout_s: float) -> int:
        """Wait for its end and return its exit status.

        Raises:
            SlurmUnavailableError: It still runs after the timeout.
        """
        ...

    def state(self) -> str:
        """RUNNING, or how it ended: COMPLETED, FAILED or CANCELLED."""
        ...

    def message(self) -> str:
        """What the launching command said, for a log: why Slurm refused or ended the step."""
        ...

    def terminate(self) -> None:
        """Ask Slurm to end the step (SIGTERM, later SIGKILL); returns at once."""
        ...


class SlurmClient(Protocol):
    """Methods raise SlurmUnavailableError while slurmctld does not answer, and SlurmMissingError without Slurm."""

    def version(self) -> str:
        """Such as `22.05.8`."""
        ...

    def jobs(
        self, *, user: str | None = None, states: Collection[str] = (), job_ids: Collection[int] = ()
    ) -> list[Job]:
        """Jobs that Slurm still remembers.

        Args:
            user: Only this user's.
            states: Only in these states; empty: pending, running, suspended and completing ones.
            job_ids: Only these, in any state if `states` is empty; unknown ones are left out.
        """
        ...

    def job(self, job_id: int) -> Job:
        """One job, also one that ended a while ago.

        Raises:
            SlurmNotFoundError: Slurm does not know it (any more).
        """
        ...

    def steps(self, job_id: int) -> list[Step]:
        """The steps of a job that run now; none for a job that waits or has ended.

        Raises:
            SlurmNotFoundError: Slurm does not know the job (any more).
        """
        ...

    def nodes(self) -> list[Node]:
        """All nodes."""
        ...

    def partitions(self) -> list[Partition]:
        """All partitions."""
        ...

    def submit(self, request: BatchRequest) -> int:
        """Submit a batch job and return its id.

        Raises:
            SlurmCommandError: Slurm refuses it.
            SlurmUnavailableError: No answer in time; it may have been submitted all the same: look for its name.
        """
        ...

    def launch_step(self, request: StepRequest) -> StepProcess:
        """Start a step inside a running job, sharing CPUs and memory with what runs there; returns at once."""
        ...

    def cancel(self, job_id: int, step_id: str | None = None, signal: str | None = None) -> None:
        """Cancel a job, or one step of it (`41.3`); with `signal` (`TERM`, `USR2`) only send that.

        What has ended already is no error. Slurm loses a signal to a step whose command is just being started, and
        cancels a step by SIGKILL at once: to let a step leave in peace, send TERM until it has ended, then cancel it.

        Raises:
            SlurmNotFoundError: Slurm does not know the job (any more).
        """
        ...

    def wait_job(self, job_id: int, *, timeout_s: float, states: Collection[str] = ENDED_JOB_STATES) -> str:
        """Wait until a job is in one of `states`, and return which.

        A job that ends in another state ends the waiting too. slurmctld may be away in between.

        Raises:
            SlurmNotFoundError: Slurm does not know the job (any more).
            SlurmUnavailableError: Not there within the timeout.
        """
        ...


def batch_script(request: BatchRequest) -> str:
    """The script of a batch job: the request's own, or one that runs its command.

    Raises:
        ValueError: It has both, or neither.
    """
    if bool(request.script) == bool(request.argv):
        raise ValueError("a BatchRequest needs either argv or script")
    return request.script or f"#!/bin/sh\nexec {shlex.join(request.argv)}\n"
