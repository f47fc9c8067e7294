"""What every SlurmClient does. The fake shows it always, the command-line client on a real slurmctld."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hydro_slurm.errors import SlurmCommandError, SlurmNotFoundError, SlurmUnavailableError
from hydro_slurm.slurm import BatchRequest, FakeSlurmClient, SlurmClient, Step, StepRequest
from hydro_slurm.testbed import Testbed

TIMEOUT_S = 30.0
UNKNOWN_JOB = 99999
ODD_TEXT = "a|b 'q' \"d\" %j % \\n ~ü;$(x) JobState=FAILED\nnext=line\x1f"


class SlurmContract:
    """Subclasses give the fixtures `slurm`, `pause` (let a little time pass) and `folder` (for output)."""

    @pytest.fixture
    def host(self, slurm: SlurmClient) -> Iterator[int]:
        """A job that runs on two nodes."""
        job_id = slurm.submit(
            BatchRequest(argv=["sleep", "600"], name="host", nodes=2, mem_mib=1000, comment="hydro:share")
        )
        assert slurm.wait_job(job_id, timeout_s=TIMEOUT_S, states={"RUNNING"}) == "RUNNING"
        yield job_id
        slurm.cancel(job_id)
        slurm.wait_job(job_id, timeout_s=TIMEOUT_S)

    def listed(self, slurm: SlurmClient, pause: Callable[[], None], job_id: int, name: str) -> Step:
        """The step of this name, as soon as it is listed."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            for step in slurm.steps(job_id):
                if step.name == name:
                    return step
            assert time.monotonic() < deadline, f"step {name} is not listed"
            pause()

    def test_says_its_version(self, slurm: SlurmClient) -> None:
        assert re.fullmatch(r"\d+\.\d+.*", slurm.version())

    def test_job_completes(self, slurm: SlurmClient) -> None:
        job_id = slurm.submit(BatchRequest(argv=["true"], name="quick", time_limit_s=120, mem_mib=100))
        assert slurm.wait_job(job_id, timeout_s=TIMEOUT_S) == "COMPLETED"
        job = slurm.job(job_id)
        assert (job.job_id, job.name, job.state, job.exit_code) == (job_id, "quick", "COMPLETED", 0)
        assert (job.partition, job.num_nodes, job.num_cpus, job.time_limit_s) == ("train", 1, 1, 120)
        assert job.submit_time_s is not None
        assert job.start_time_s is not None
        assert job.end_time_s is not None
        assert job.submit_time_s <= job.start_time_s <= job.end_time_s
        assert job.ended

    def test_failed_job_keeps_its_exit_code(self, slurm: SlurmClient) -> None:
        job_id = slurm.submit(BatchRequest(argv=["sh", "-c", "exit 3"]))
        assert slurm.wait_job(job_id, timeout_s=TIMEOUT_S) == "FAILED"
        assert slurm.job(job_id).exit_code == 3

    def test_script_is_run(self, slurm: SlurmClient) -> None:
        job_id = slurm.submit(BatchRequest(script="#!/bin/sh\n# a comment\nfalse\n"))
        assert slurm.wait_job(job_id, timeout_s=TIMEOUT_S) == "FAILED"
        assert slurm.job(job_id).exit_code == 1

    def test_needs_a_command_or_a_script(self, slurm: SlurmClient) -> None:
        with pytest.raises(ValueError, match="argv or script"):
            slurm.submit(BatchRequest(name="nothing"))

    def test_running_job_is_shown_whole(self, slurm: SlurmClient, host: int) -> None:
        job = slurm.job(host)
        assert (job.name, job.state, job.comment, job.num_nodes) == ("host", "RUNNING", "hydro:share", 2)
        assert len(job.nodes) == 2
        assert set(job.nodes) <= {node.name for node in slurm.nodes()}
        assert job.exit_code is None
        assert not job.ended
        assert job in slurm.jobs(user=job.user)
        assert job in slurm.jobs(states={"RUNNING", "PENDING"})

    def test_jobs_are_selected(self, slurm: SlurmClient, host: int) -> None:
        ended = slurm.submit(BatchRequest(argv=["true"]))
        slurm.wait_job(ended, timeout_s=TIMEOUT_S)
        assert ended not in {job.job_id for job in slurm.jobs()}
        assert host in {job.job_id for job in slurm.jobs()}
        assert {job.job_id for job in slurm.jobs(job_ids=[ended, host, UNKNOWN_JOB])} == {ended, host}
        assert slurm.jobs(job_ids=[UNKNOWN_JOB]) == []
        assert host not in {job.job_id for job in slurm.jobs(states={"COMPLETED"})}
        assert ended in {job.job_id for job in slurm.jobs(states={"COMPLETED"})}
        assert [job.job_id for job in slurm.jobs(states={"PENDING"}, job_ids=[host])] == []

    def test_job_without_room_waits(self, slurm: SlurmClient, host: int) -> None:
        waiting = slurm.submit(BatchRequest(argv=["true"], nodes=4, ntasks_per_node=2, mem_mib=100))
        assert slurm.wait_job(waiting, timeout_s=TIMEOUT_S, states={"PENDING"}) == "PENDING"
        assert slurm.job(waiting).nodes == ()
        with pytest.raises(SlurmUnavailableError, match=f"job {waiting} is PENDING"):
            slurm.wait_job(waiting, timeout_s=0.2)
        slurm.cancel(host)
        assert slurm.wait_job(waiting, timeout_s=TIMEOUT_S) == "COMPLETED"
        assert len(slurm.job(waiting).nodes) == 4

    def test_cancelled_jobs_end_cancelled(self, slurm: SlurmClient) -> None:
        running = slurm.submit(BatchRequest(argv=["sleep", "600"], nodes=4, ntasks_per_node=2, mem_mib=100))
        slurm.wait_job(running, timeout_s=TIMEOUT_S, states={"RUNNING"})
        pending = slurm.submit(BatchRequest(argv=["sleep", "600"], mem_mib=100))
        slurm.cancel(pending)
        slurm.cancel(running)
        assert slurm.wait_job(pending, timeout_s=TIMEOUT_S) == "CANCELLED"
        assert slurm.wait_job(running, timeout_s=TIMEOUT_S) == "CANCELLED"
        slurm.cancel(running)  # what has ended is no error

    def test_unknown_job_is_not_found(self, slurm: SlurmClient) -> None:
        with pytest.raises(SlurmNotFoundError):
            slurm.job(UNKNOWN_JOB)
        with pytest.raises(SlurmNotFoundError):
            slurm.steps(UNKNOWN_JOB)
        with pytest.raises(SlurmNotFoundError):
            slurm.cancel(UNKNOWN_JOB)
        with pytest.raises(SlurmNotFoundError):
            slurm.cancel(UNKNOWN_JOB, f"{UNKNOWN_JOB}.0")
        with pytest.raises(SlurmNotFoundError):
            slurm.wait_job(UNKNOWN_JOB, timeout_s=1.0)

    def test_odd_characters_are_kept(self, slurm: SlurmClient) -> None:
        job_id = slurm.submit(BatchRequest(argv=["true"], name="odd|na me~ü", comment=ODD_TEXT))
        job = slurm.job(job_id)
        assert (job.name, job.comment) == ("odd|na me~ü", ODD_TEXT)
        assert [one.comment for one in slurm.jobs(job_ids=[job_id])] == [ODD_TEXT]
        slurm.cancel(job_id)

    def test_what_cannot_run_is_refused(self, slurm: SlurmClient) -> None:
        with pytest.raises(SlurmCommandError, match="sbatch"):
            slurm.submit(BatchRequest(argv=["true"], mem_mib=1_000_000))
        with pytest.raises(SlurmCommandError, match="sbatch"):
            slurm.submit(BatchRequest(argv=["true"], node_list=["nowhere"]))
        with pytest.raises(SlurmCommandError, match="sbatch"):
            slurm.submit(BatchRequest(argv=["true"], partition="nowhere"))

    def test_job_that_can_never_start_waits_alone(self, slurm: SlurmClient) -> None:
        never = slurm.submit(BatchRequest(argv=["true"], nodes=50, mem_mib=100))
        after = slurm.submit(BatchRequest(argv=["true"], mem_mib=100))
        assert slurm.wait_job(after, timeout_s=TIMEOUT_S) == "COMPLETED"
        assert (slurm.job(never).state, slurm.job(never).reason) == ("PENDING", "PartitionConfig")
        slurm.cancel(never)

    def test_node_list_is_heeded(self, slurm: SlurmClient) -> None:
        job_id = slurm.submit(BatchRequest(argv=["true"], node_list=["n3"], mem_mib=100))
        slurm.wait_job(job_id, timeout_s=TIMEOUT_S)
        assert slurm.job(job_id).nodes == ("n3",)

    def test_lists_nodes_and_partitions(self, slurm: SlurmClient, host: int) -> None:
        nodes = {node.name: node for node in slurm.nodes()}
        assert list(nodes) == ["n1", "n2", "n3", "n4"]
        assert {(node.cpus, node.memory_mib, node.partitions) for node in nodes.values()} == {(2, 4096, ("train",))}
        used = {name for name, node in nodes.items() if node.state in ("MIXED", "ALLOCATED")}
        assert used == set(slurm.job(host).nodes)
        (partition,) = slurm.partitions()
        assert (partition.name, partition.state, partition.default) == ("train", "UP", True)
        assert partition.nodes == ("n1", "n2", "n3", "n4")
        assert partition.time_limit_s is None

    def test_overlapping_step_is_listed_and_completes(
        self, slurm: SlurmClient, pause: Callable[[], None], host: int, folder: Path
    ) -> None:
        node = slurm.job(host).nodes[1]
        long = slurm.launch_step(
            StepRequest(job_id=host, node=node, argv=["sleep", "600"], name="bundle|1", mem_mib=900)
        )
        step = self.listed(slurm, pause, host, "bundle|1")
        assert (step.job_id, step.nodes, step.num_tasks, step.state) == (host, (node,), 1, "RUNNING")
        assert re.fullmatch(rf"{host}\.\d+", step.step_id)
        assert (long.poll(), long.state(), long.name) == (None, "RUNNING", "bundle|1")
        # A second one, beside the first on the same node: together they ask for more than the job holds.
        output = folder / "second %j.txt"
        second = slurm.launch_step(
            StepRequest(job_id=host, node=node, argv=["echo", "hello"], name="second", mem_mib=900, output=output)
        )
        assert second.wait(TIMEOUT_S) == 0
        assert (second.poll(), second.state()) == (0, "COMPLETED")
        assert output.read_text() == "hello\n"
        slurm.cancel(host, step.step_id)
        long.wait(TIMEOUT_S)

    def test_cancelled_step_ends_cancelled(self, slurm: SlurmClient, pause: Callable[[], None], host: int) -> None:
        node = slurm.job(host).nodes[0]
        process = slurm.launch_step(
            StepRequest(job_id=host, node=node, argv=["sleep", "600"], name="bundle", mem_mib=10)
        )
        step = self.listed(slurm, pause, host, "bundle")
        slurm.cancel(host, step.step_id)
        assert process.wait(TIMEOUT_S) != 0
        assert process.state() == "CANCELLED"
        assert "bundle" not in {step.name for step in slurm.steps(host)}
        assert slurm.job(host).state == "RUNNING"
        slurm.cancel(host, step.step_id)  # what has ended is no error

    def test_terminated_step_ends_cancelled(self, slurm: SlurmClient, pause: Callable[[], None], host: int) -> None:
        node = slurm.job(host).nodes[0]
        process = slurm.launch_step(
            StepRequest(job_id=host, node=node, argv=["sleep", "600"], name="bundle", mem_mib=10)
        )
        self.listed(slurm, pause, host, "bundle")
        process.terminate()
        assert process.wait(TIMEOUT_S) != 0
        assert process.state() == "CANCELLED"

    def test_signalled_step_ends_by_the_signal(self, slurm: SlurmClient, pause: Callable[[], None], host: int) -> None:
        node = slurm.job(host).nodes[0]
        process = slurm.launch_step(
            StepRequest(job_id=host, node=node, argv=["sleep", "600"], name="bundle", mem_mib=10)
        )
        step = self.listed(slurm, pause, host, "bundle")
        deadline = time.monotonic() + TIMEOUT_S
        while process.poll() is None:  # a signal to a step whose command has not started yet is lost
            assert time.monotonic() < deadline, "the signal does not arrive"
            slurm.cancel(host, step.step_id, signal="TERM")
            pause()
        assert process.wait(TIMEOUT_S) == 143
        assert process.state() == "FAILED"

    def test_failed_step_keeps_its_exit_code(self, slurm: SlurmClient, host: int) -> None:
        node = slurm.job(host).nodes[0]
        process = slurm.launch_step(StepRequest(job_id=host, node=node, argv=["sh", "-c", "exit 7"], mem_mib=10))
        assert process.wait(TIMEOUT_S) == 7
        assert process.state() == "FAILED"

    def test_step_waits_no_longer_than_it_is_told(self, slurm: SlurmClient, host: int) -> None:
        node = slurm.job(host).nodes[0]
        process = slurm.launch_step(StepRequest(job_id=host, node=node, argv=["sleep", "600"], name="long", mem_mib=10))
        with pytest.raises(SlurmUnavailableError, match="long"):
            process.wait(0.1)

    def test_step_outside_its_job_fails(self, slurm: SlurmClient, host: int) -> None:
        elsewhere = sorted({node.name for node in slurm.nodes()} - set(slurm.job(host).nodes))[0]
        process = slurm.launch_step(StepRequest(job_id=host, node=elsewhere, argv=["true"]))
        assert process.wait(TIMEOUT_S) != 0
        assert process.state() == "FAILED"
        assert str(host) in process.message()

    def test_end_of_the_job_ends_its_steps(self, slurm: SlurmClient, pause: Callable[[], None], host: int) -> None:
        node = slurm.job(host).nodes[1]
        process = slurm.launch_step(
            StepRequest(job_id=host, node=node, argv=["sleep", "600"], name="bundle", mem_mib=10)
        )
        self.listed(slurm, pause, host, "bundle")
        slurm.cancel(host)
        assert process.wait(TIMEOUT_S) != 0
        assert process.state() == "CANCELLED"
        assert slurm.wait_job(host, timeout_s=TIMEOUT_S) == "CANCELLED"
        assert slurm.steps(host) == []


class TestFakeSlurmClient(SlurmContract):
    @pytest.fixture
    def slurm(self) -> FakeSlurmClient:
        return FakeSlurmClient()

    @pytest.fixture
    def pause(self, slurm: FakeSlurmClient) -> Callable[[], None]:
        return lambda: slurm.clock.sleep(0.1)

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return tmp_path


class TestCommandLineClient(SlurmContract):
    @pytest.fixture
    def slurm(self, testbed: Testbed, user: str) -> SlurmClient:
        return testbed.client(user)

    @pytest.fixture
    def pause(self) -> Callable[[], None]:
        return lambda: time.sleep(0.05)

    @pytest.fixture
    def folder(self, testbed: Testbed, user: str) -> Path:
        return testbed.shared_dir / "homes" / user
