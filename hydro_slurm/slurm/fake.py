"""A SlurmClient in memory, with time that is handed in: for tests of what uses Slurm.

It knows what a few commands would do (`sleep`, `true`, `false`, `sh -c "exit N"`, `echo`); everything else runs until
the test ends it by `end_job` or `end_step`. It places whole CPUs, first come, first served.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hydro_slurm.clock import Clock, ManualClock
from hydro_slurm.errors import SlurmCommandError, SlurmMissingError, SlurmNotFoundError, SlurmUnavailableError
from hydro_slurm.slurm.client import batch_script
from hydro_slurm.slurm.records import ENDED_JOB_STATES, BatchRequest, Job, Node, Partition, Step, StepRequest

_DEFAULT_LIMIT_S = 365 * 86400.0
_ACTIVE = frozenset({"PENDING", "RUNNING", "COMPLETING", "SUSPENDED"})
_SIGNAL_NUMBERS = {"TERM": 15, "KILL": 9, "INT": 2, "USR1": 10, "USR2": 12, "CONT": 18, "STOP": 19, "HUP": 1}
_HARMLESS = frozenset({"CONT", "STOP"})
_POLL_S = 0.1


@dataclass
class _Program:
    """What a command does: when it ends (seconds after its start; null: when it is told to), and how."""

    duration_s: float | None
    exit_code: int
    output: str = ""


@dataclass
class _FakeJob:
    job: Job
    program: _Program
    cpus_per_node: int
    mem_mib: int
    node_list: tuple[str, ...]
    steps: list[FakeStep] = field(default_factory=list)


class FakeStep:
    """A StepProcess of a FakeSlurmClient. `request` is what it was launched with."""

    def __init__(self, client: FakeSlurmClient, request: StepRequest, step_id: str, program: _Program) -> None:
        self.request, self.step_id = request, step_id
        self._client, self._program, self._start_s = client, program, client.clock.wall_s()
        self._code: int | None = None
        self._state, self._message = "RUNNING", ""

    @property
    def name(self) -> str:
        return self.request.name

    @property
    def pid(self) -> int:
        return 0

    def poll(self) -> int | None:
        self._client.advance()
        return self._code

    def wait(self, timeout_s: float) -> int:
        deadline_s = self._client.clock.wall_s() + timeout_s
        while (code := self.poll()) is None:
            if self._client.clock.wall_s() >= deadline_s:
                raise SlurmUnavailableError(f"step {self.name!r} still runs after {timeout_s:g} s")
            self._client.clock.sleep(_POLL_S)
        return code

    def state(self) -> str:
        self.poll()
        return self._state

    def message(self) -> str:
        return self._message

    def terminate(self) -> None:
        self.finish(137, "CANCELLED", "srun: forcing job termination")

    def finish(self, code: int, state: str = "", message: str = "") -> None:
        """End it now; the state follows from the exit status unless it is given."""
        if self._code is None:
            self._code, self._message = code, message
            self._state = state or ("COMPLETED" if code == 0 else "FAILED")
            if self.request.output is not None and self._program.output:
                with Path(self.request.output).open("a") as file:
                    file.write(self._program.output)

    def run_on(self, now_s: float) -> None:
        """End it if its command has ended by now."""
        duration_s = self._program.duration_s
        if duration_s is not None and now_s >= self._start_s + duration_s:
            self.finish(self._program.exit_code)


class FakeSlurmClient:
    """See the module. Set `unavailable` or `missing` to make every call fail that way."""

    def __init__(
        self,
        clock: Clock | None = None,
        *,
        num_nodes: int = 4,
        cpus: int = 2,
        memory_mib: int = 4096,
        user: str = "alice",
        on_step: Callable[[FakeStep], None] | None = None,
    ) -> None:
        self.clock: Clock = clock or ManualClock()
        self.unavailable = self.missing = False
        self.launched: list[FakeStep] = []
        """Every step launched so far, ended ones too."""
        self._user, self._on_step = user, on_step
        self._cpus, self._memory_mib = cpus, memory_mib
        self._nodes = tuple(f"n{number}" for number in range(1, num_nodes + 1))
        self._jobs: dict[int, _FakeJob] = {}

    def end_job(self, job_id: int, exit_code: int = 0, state: str = "") -> None:
        """The job's command ends now; its steps end with it, as Slurm has it."""
        self._end(self._known(job_id), exit_code, state or ("FAILED" if exit_code else "COMPLETED"))

    def end_step(self, step_id: str, exit_code: int = 0) -> None:
        """A step's command ends now."""
        job = self._known(int(step_id.split(".")[0]))
        next(step for step in job.steps if step.step_id == step_id).finish(exit_code)

    def version(self) -> str:
        self._answer()
        return "22.05.8"

    def jobs(
        self, *, user: str | None = None, states: Collection[str] = (), job_ids: Collection[int] = ()
    ) -> list[Job]:
        self._answer()
        chosen = states or (None if job_ids else _ACTIVE)
        return [
            fake.job
            for fake in self._jobs.values()
            if user in (None, fake.job.user)
            and (chosen is None or fake.job.state in chosen)
            and (not job_ids or fake.job.job_id in job_ids)
        ]

    def job(self, job_id: int) -> Job:
        self._answer()
        return self._known(job_id).job

    def steps(self, job_id: int) -> list[Step]:
        self._answer()
        return [
            Step(
                job_id=job_id,
                step_id=step.step_id,
                name=step.name,
                state="RUNNING",
                nodes=(step.request.node,),
                num_tasks=1,
            )
            for step in self._known(job_id).steps
            if step.poll() is None
        ]

    def nodes(self) -> list[Node]:
        self._answer()
        found = []
        for name in self._nodes:
            used = self._used(name)[0]
            state = "IDLE" if used == 0 else "ALLOCATED" if used == self._cpus else "MIXED"
            facts = {"cpus": self._cpus, "memory_mib": self._memory_mib, "gres": "", "partitions": ("train",)}
            found.append(Node(name=name, state=state, **facts))  # type: ignore[arg-type]
        return found

    def partitions(self) -> list[Partition]:
        self._answer()
        return [Partition(name="train", state="UP", nodes=self._nodes, default=True, time_limit_s=None)]

    def submit(self, request: BatchRequest) -> int:
        self._answer()
        script = batch_script(request)
        cpus_per_node = (request.ntasks_per_node or 1) * (request.cpus_per_task or 1)
        mem_mib = request.mem_mib or self._memory_mib // self._cpus * cpus_per_node
        num_nodes = request.nodes or max(1, len(request.node_list))
        if (
            mem_mib > self._memory_mib
            or not set(request.node_list) <= set(self._nodes)
            or request.partition not in ("", "train")
        ):
            reason = "sbatch: error: Batch job submission failed: Requested node configuration is not available"
            raise SlurmCommandError(["sbatch", "--parsable"], 1, reason)
        job = Job(
            job_id=len(self._jobs) + 1,
            name=request.name or "sbatch",
            user=self._user,
            state="PENDING",
            partition="train",
            nodes=(),
            num_nodes=num_nodes,
            num_cpus=num_nodes * cpus_per_node,
            comment=request.comment,
            submit_time_s=self.clock.wall_s(),
            start_time_s=None,
            end_time_s=None,
            time_limit_s=request.time_limit_s or _DEFAULT_LIMIT_S,
            work_dir=str(request.work_dir or "/"),
            reason="None",
        )
        program = _program(request.argv or _last_command(script))
        self._jobs[job.job_id] = _FakeJob(job, program, cpus_per_node, mem_mib, tuple(request.node_list))
        return job.job_id

    def launch_step(self, request: StepRequest) -> FakeStep:
        if self.missing:
            self._answer()
        self.advance()
        fake = self._jobs.get(request.job_id)
        number = len(fake.steps) if fake else 0
        step = FakeStep(self, request, f"{request.job_id}.{number}", _program(request.argv))
        if self.unavailable:
            step.finish(1, message="srun: error: Unable to contact slurm controller (connect failure)")
        elif fake is None or fake.job.state != "RUNNING":
            step.finish(1, message=f"srun: error: Unable to confirm allocation for job {request.job_id}")
        elif request.node not in fake.job.nodes:
            step.finish(1, message=f"srun: error: Unable to create step for job {request.job_id}: wrong node")
        else:
            fake.steps.append(step)
        self.launched.append(step)
        if self._on_step is not None:
            self._on_step(step)
        return step

    def cancel(self, job_id: int, step_id: str | None = None, signal: str | None = None) -> None:
        self._answer()
        fake = self._known(job_id)
        if signal in _HARMLESS:
            return
        number = _SIGNAL_NUMBERS.get(signal or "KILL", 15)
        if step_id is not None:
            for step in fake.steps:
                if step.step_id == step_id:
                    step.finish(128 + number, "FAILED" if signal else "CANCELLED", "srun: error: task 0: Killed")
        elif signal:
            for step in fake.steps:
                step.finish(128 + number, "FAILED", "srun: error: task 0: Terminated")
        elif not fake.job.ended:
            self._end(fake, 143 if fake.job.state == "RUNNING" else 0, "CANCELLED")

    def wait_job(self, job_id: int, *, timeout_s: float, states: Collection[str] = ENDED_JOB_STATES) -> str:
        deadline_s = self.clock.wall_s() + timeout_s
        while True:
            state = self.job(job_id).state
            if state in states or state in ENDED_JOB_STATES:
                return state
            if self.clock.wall_s() >= deadline_s:
                raise SlurmUnavailableError(f"job {job_id} is {state} after {timeout_s:g} s")
            self.clock.sleep(_POLL_S)

    def advance(self) -> None:
        """Let everything happen that is due by now: commands and time limits end, waiting jobs start."""
        now_s = self.clock.wall_s()
        for fake in self._jobs.values():
            if fake.job.state != "RUNNING" or fake.job.start_time_s is None:
                continue
            for step in fake.steps:
                step.run_on(now_s)
            duration_s = fake.program.duration_s
            if duration_s is not None and now_s >= fake.job.start_time_s + duration_s:
                self._end(fake, fake.program.exit_code, "FAILED" if fake.program.exit_code else "COMPLETED")
            elif now_s >= fake.job.start_time_s + (fake.job.time_limit_s or _DEFAULT_LIMIT_S):
                self._end(fake, 0, "TIMEOUT")
        for fake in self._jobs.values():
            if fake.job.state != "PENDING":
                continue
            if fake.job.num_nodes > len(self._nodes) or fake.cpus_per_node > self._cpus:
                fake.job = replace(fake.job, reason="PartitionConfig")
            elif not self._start(fake, now_s):
                break

    def _start(self, fake: _FakeJob, now_s: float) -> bool:
        free = []
        for name in sorted(self._nodes, key=lambda name: name not in fake.node_list):
            used_cpus, used_mib = self._used(name)
            if used_cpus + fake.cpus_per_node <= self._cpus and used_mib + fake.mem_mib <= self._memory_mib:
                free.append(name)
        chosen = free[: fake.job.num_nodes]
        if len(chosen) < fake.job.num_nodes or not set(fake.node_list) <= set(chosen):
            fake.job = replace(fake.job, reason="Resources")
            return False
        end_s = now_s + (fake.job.time_limit_s or _DEFAULT_LIMIT_S)
        nodes = tuple(name for name in self._nodes if name in chosen)
        fake.job = replace(fake.job, state="RUNNING", nodes=nodes, start_time_s=now_s, end_time_s=end_s, reason="None")
        return True

    def _used(self, node: str) -> tuple[int, int]:
        there = [fake for fake in self._jobs.values() if fake.job.state == "RUNNING" and node in fake.job.nodes]
        return sum(fake.cpus_per_node for fake in there), sum(fake.mem_mib for fake in there)

    def _end(self, fake: _FakeJob, exit_code: int, state: str) -> None:
        now_s = self.clock.wall_s()
        for step in fake.steps:
            step.finish(143, "CANCELLED", "srun: Job step aborted")
        fake.job = replace(fake.job, state=state, exit_code=exit_code, end_time_s=now_s)

    def _known(self, job_id: int) -> _FakeJob:
        if job_id not in self._jobs:
            raise SlurmNotFoundError(f"Slurm does not know job {job_id} (any more)")
        return self._jobs[job_id]

    def _answer(self) -> None:
        if self.missing:
            raise SlurmMissingError("the command 'squeue' is not on PATH")
        if self.unavailable:
            raise SlurmUnavailableError("Unable to contact slurm controller (connect failure)")
        self.advance()


def _program(argv: Sequence[str]) -> _Program:
    match list(argv):
        case ["sleep", seconds]:
            return _Program(float(seconds), 0)
        case ["true"]:
            return _Program(0.0, 0)
        case ["false"]:
            return _Program(0.0, 1)
        case ["echo", *words]:
            return _Program(0.0, 0, " ".join(words) + "\n")
        case ["sh", "-c", text] if text.startswith("exit "):
            return _Program(0.0, int(text.split()[1]))
    return _Program(None, 0)


def _last_command(script: str) -> list[str]:
    lines = [line for line in script.splitlines() if line.strip() and not line.startswith("#")]
    return shlex.split(lines[-1]) if lines else ["true"]
