"""The SlurmClient that runs Slurm's own commands. Works with every Slurm, and needs nothing else."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from hydro_slurm.clock import Clock, SystemClock
from hydro_slurm.errors import (
    SlurmCommandError,
    SlurmError,
    SlurmNotFoundError,
    SlurmUnavailableError,
)
from hydro_slurm.slurm import hostlist
from hydro_slurm.slurm.client import StepProcess, batch_script
from hydro_slurm.slurm.environment import scrubbed_environment
from hydro_slurm.slurm.launch import SrunStep, batch_options, missing_command, step_command
from hydro_slurm.slurm.records import ENDED_JOB_STATES, BatchRequest, Job, Node, Partition, Step, StepRequest
from hydro_slurm.slurm.text import Layout, integers, null_to_empty, parse_duration, parse_exit_code, parse_time

_UNAVAILABLE = (
    "Unable to contact slurm controller",
    "Connection refused",
    "Connection timed out",
    "Socket timed out",
    "Zero Bytes were transmitted or received",
    "Slurm backup controller in standby mode",
    "Munge encode failed",
    "Transport endpoint is not connected",
    "Insane message length",
    "Message receive failure",
)
_NOT_FOUND = ("Invalid job id specified",)
_ENDED = ("Job/step already completing or completed", "Invalid job step")
_WAIT_FIRST_S, _WAIT_MOST_S = 0.1, 5.0


class CommandLineClient:
    """Speaks to the cluster that SLURM_CONF (or the system's default) names.

    Args:
        prefix: Put before every command, such as `sudo -u alice`, or a testbed's `command_prefix`.
        env: The commands' environment, instead of this process's; either way without a surrounding job's variables.
        timeout_s: A command that takes longer is ended, and counts as "Slurm is not available".
    """

    def __init__(
        self,
        prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        timeout_s: float = 30.0,
        clock: Clock | None = None,
    ) -> None:
        self._prefix, self._timeout_s = list(prefix), timeout_s
        self._step_env = scrubbed_environment(env)
        self._env = {**self._step_env, "SLURM_TIME_FORMAT": "%s"}
        self._clock: Clock = clock or SystemClock()

    def version(self) -> str:
        return self._run(["sinfo", "--version"]).split()[-1]

    def jobs(
        self, *, user: str | None = None, states: Collection[str] = (), job_ids: Collection[int] = ()
    ) -> list[Job]:
        options = [] if user is None else [f"--user={user}"]
        if job_ids:
            options.append("--jobs=" + ",".join(str(job_id) for job_id in sorted(job_ids)))
        if states or job_ids:
            options.append("--states=" + (",".join(sorted(states)) or "all"))
        try:
            return self._jobs(options)
        except SlurmNotFoundError:
            return []

    def job(self, job_id: int) -> Job:
        for job in self._jobs([f"--jobs={job_id}", "--states=all"]):
            if job.job_id == job_id:
                return job
        raise SlurmNotFoundError(f"Slurm does not know job {job_id} (any more)")

    def steps(self, job_id: int) -> list[Step]:
        layout = Layout(["%i", "%N", "%A", "%j"])
        output = self._run(["squeue", "--noheader", "--steps", f"--jobs={job_id}", "-o", layout.text])
        found = [
            Step(
                job_id=job_id,
                step_id=step_id,
                name=name,
                state="RUNNING",  # squeue lists no other
                nodes=hostlist.expand(nodes),
                num_tasks=integers([tasks])[0],
            )
            for step_id, nodes, tasks, name in layout.records(output)
        ]
        if not found:
            self.job(job_id)  # an unknown job looks the same
        return found

    def nodes(self) -> list[Node]:
        layout = Layout(["%N", "%T", "%c", "%m", "%R", "%G"])
        found: dict[str, Node] = {}
        for name, state, cpus, memory, partition, gres in layout.records(
            self._run(["sinfo", "-haN", "-o", layout.text])
        ):
            partitions = found[name].partitions if name in found else ()
            found[name] = Node(
                name=name,
                state=state.rstrip("*~#!%$@+^-").upper(),
                cpus=integers([cpus])[0],
                memory_mib=integers([memory.rstrip("+")])[0],
                gres=null_to_empty(gres),
                partitions=(*partitions, partition),
                responding="*" not in state,
            )
        return list(found.values())

    def partitions(self) -> list[Partition]:
        layout = Layout(["%R", "%a", "%N", "%l", "%P"])
        return [
            Partition(
                name=name,
                state=state.upper(),
                nodes=hostlist.expand(nodes),
                default=marked == f"{name}*",
                time_limit_s=parse_duration(limit),
            )
            for name, state, nodes, limit, marked in layout.records(self._run(["sinfo", "-ha", "-o", layout.text]))
        ]

    def submit(self, request: BatchRequest) -> int:
        argv = ["sbatch", "--parsable", *batch_options(request)]
        output = self._run(argv, stdin=batch_script(request), env=request.env)
        return integers([output.strip().split(";")[0]])[0]

    def launch_step(self, request: StepRequest) -> StepProcess:
        return SrunStep([*self._prefix, *step_command(request)], {**self._step_env, **request.env}, request.name)

    def cancel(self, job_id: int, step_id: str | None = None, signal: str | None = None) -> None:
        # Without --verbose, 22.05 is silent about an unknown job and exits 0.
        options = ["--verbose"] + ([f"--signal={signal}"] if signal else [])
        target = step_id or str(job_id)
        argv = ["scancel", *options, target]
        done = self._complete(argv)
        error = "\n".join(line for line in done.stderr.splitlines() if "error:" in line)
        if any(text in error for text in _ENDED) or not (error or done.returncode):
            return
        try:
            raise _error(argv, done.returncode, error or done.stderr)
        except SlurmNotFoundError:
            if not step_id and not signal:
                raise
            self.job(job_id)  # an ended step, or a signal to an ended job, is called an invalid job id too

    def wait_job(self, job_id: int, *, timeout_s: float, states: Collection[str] = ENDED_JOB_STATES) -> str:
        deadline_ns = self._clock.monotonic_ns() + round(timeout_s * 1e9)
        pause_s = _WAIT_FIRST_S
        while True:
            try:
                seen = self.job(job_id).state
            except SlurmUnavailableError:
                seen = "not answered for"
            if seen in states or seen in ENDED_JOB_STATES:
                return seen
            left_s = (deadline_ns - self._clock.monotonic_ns()) / 1e9
            if left_s <= 0:
                wanted = " or ".join(sorted(states))
                raise SlurmUnavailableError(f"job {job_id} is {seen} after {timeout_s:g} s, not yet {wanted}")
            self._clock.sleep(min(pause_s, left_s))
            pause_s = min(pause_s * 1.5, _WAIT_MOST_S)

    def _jobs(self, options: list[str]) -> list[Job]:
        layout = Layout(["%A", "%u", "%T", "%P", "%N", "%D", "%C", "%V", "%S", "%e", "%l", "%r", "%j", "%k", "%Z"])
        output = self._run(["squeue", "--noheader", *options, "-o", layout.text])
        jobs = [_job(fields) for fields in layout.records(output)]
        ended = [job.job_id for job in jobs if job.ended]
        codes = self._exit_codes(ended) if ended else {}
        return [replace(job, exit_code=codes.get(job.job_id)) if job.ended else job for job in jobs]

    def _exit_codes(self, job_ids: list[int]) -> dict[int, int | None]:
        """Exit statuses, which `squeue -o` cannot print; both columns are numbers, so blanks separate them safely."""
        chosen = "--jobs=" + ",".join(str(job_id) for job_id in job_ids)
        try:
            output = self._run(["squeue", "--noheader", "--states=all", chosen, "-O", "JobID:20,exit_code:20"])
        except SlurmNotFoundError:
            return {}
        pairs = [line.split() for line in output.splitlines()]
        return {integers(pair[:1])[0]: parse_exit_code(pair[1]) for pair in pairs if len(pair) == 2}

    def _run(self, argv: Sequence[str], *, stdin: str = "", env: Mapping[str, str] | None = None) -> str:
        done = self._complete(argv, stdin=stdin, env=env)
        if done.returncode != 0:
            raise _error(argv, done.returncode, done.stderr)
        return done.stdout

    def _complete(
        self, argv: Sequence[str], *, stdin: str = "", env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [*self._prefix, *argv],
                env={**self._env, **(env or {})},
                input=stdin,
                capture_output=True,
                encoding="utf-8",
                errors="surrogateescape",
                timeout=self._timeout_s,
                check=False,
            )
        except FileNotFoundError as error:
            raise missing_command(str(error.filename)) from None
        except subprocess.TimeoutExpired:
            raise SlurmUnavailableError(
                f"`{_shown(argv)}` did not answer within {self._timeout_s:g} s; is slurmctld up?"
            ) from None


def _job(fields: list[str]) -> Job:
    job_id, user, state, partition, nodes, num_nodes, num_cpus, submit, start, end, limit, reason, *free = fields
    numbers = integers([job_id, num_nodes, num_cpus])
    return Job(
        job_id=numbers[0],
        name=free[0],
        user=user,
        state=state,
        partition=partition,
        nodes=hostlist.expand(nodes),
        num_nodes=numbers[1],
        num_cpus=numbers[2],
        comment=null_to_empty(free[1]),
        submit_time_s=parse_time(submit),
        start_time_s=parse_time(start),
        end_time_s=parse_time(end),
        time_limit_s=parse_duration(limit),
        work_dir=null_to_empty(free[2]),
        reason=reason,
    )


def _error(argv: Sequence[str], returncode: int, stderr: str) -> SlurmError:
    command = _shown(argv)
    if returncode == 127 and "No such file" in stderr:
        return missing_command(argv[0])
    if any(text in stderr for text in _UNAVAILABLE):
        return SlurmUnavailableError(f"`{command}`: {stderr.strip()}")
    if any(text in stderr for text in _NOT_FOUND):
        return SlurmNotFoundError(f"`{command}`: {stderr.strip()}")
    return SlurmCommandError(argv, returncode, stderr)


def _shown(argv: Sequence[str]) -> str:
    """A command for people: without its output format."""
    return shlex.join(argv[: argv.index("-o")] if "-o" in argv else argv)
