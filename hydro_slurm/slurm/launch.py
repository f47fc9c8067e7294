"""Command lines of batch jobs and overlapping steps, and the running `srun` of a step."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydro_slurm.errors import SlurmMissingError, SlurmUnavailableError
from hydro_slurm.slurm.records import BatchRequest, StepRequest
from hydro_slurm.slurm.text import format_duration

_MAX_MESSAGE_BYTES = 64 << 10
_CANCELLED = ("Job step aborted", "CANCELLED AT", "Job has been cancelled", "Job/step already completing")
"""What srun says when a step is cancelled, alone or with its job, and not when its command fails."""


def batch_options(request: BatchRequest) -> list[str]:
    """The options of `sbatch`, in one fixed order."""
    values = {
        "job-name": request.name,
        "nodes": request.nodes,
        "ntasks-per-node": request.ntasks_per_node,
        "cpus-per-task": request.cpus_per_task,
        "mem": None if request.mem_mib is None else f"{request.mem_mib}M",
        "time": None if request.time_limit_s is None else format_duration(request.time_limit_s),
        "comment": request.comment,
        "output": request.output,
        "partition": request.partition,
        "nodelist": ",".join(request.node_list),
        "gres": request.gres,
        "chdir": request.work_dir,
    }
    options = _options(values)
    if request.requeue is not None:
        options.append("--requeue" if request.requeue else "--no-requeue")
    return [*options, *request.extra_options]


def step_command(request: StepRequest) -> list[str]:
    """The whole `srun` command of an overlapping step."""
    values = {
        "jobid": request.job_id,
        "nodelist": request.node,
        "nodes": 1,
        "ntasks": 1,
        "job-name": request.name,
        "mem": None if request.mem_mib is None else f"{request.mem_mib}M",
        "cpus-per-task": request.cpus_per_task,
        "chdir": request.work_dir,
        "input": "none",
        "output": "none" if request.output is None else str(request.output).replace("%", "%%"),
        "open-mode": "append",
    }
    return ["srun", "--overlap", *_options(values), *request.extra_options, "--", *request.argv]


def _options(values: Mapping[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items() if value is not None and value != ""]


def missing_command(command: str) -> SlurmMissingError:
    """The error that says that a Slurm command is not installed."""
    return SlurmMissingError(
        f"the command {Path(command).name!r} is not on PATH; run this on a machine of the cluster, "
        "or install Slurm's client commands (Debian: apt-get install slurm-client)"
    )


class SrunStep:
    """A StepProcess whose step lives as long as its `srun`, which runs in a session of its own."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], name: str) -> None:
        self._name = name
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as this object)
        try:
            self._process = subprocess.Popen(
                argv,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise missing_command(str(error.filename)) from None

    @property
    def name(self) -> str:
        return self._name

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def wait(self, timeout_s: float) -> int:
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise SlurmUnavailableError(f"step {self._name!r} still runs after {timeout_s:g} s") from None
        return code if code >= 0 else 128 - code

    def state(self) -> str:
        code = self.poll()
        if code is None:
            return "RUNNING"
        if code == 0:
            return "COMPLETED"
        return "CANCELLED" if any(text in self.message() for text in _CANCELLED) else "FAILED"

    def message(self) -> str:
        # srun writes at the offset that it shares with us, so this must not move it.
        return os.pread(self._stderr.fileno(), _MAX_MESSAGE_BYTES, 0).decode(errors="replace").strip()

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)
