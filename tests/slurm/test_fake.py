"""What only the fake can do: time at hand, ends on demand, failures on demand."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydro_slurm.clock import ManualClock
from hydro_slurm.errors import SlurmMissingError, SlurmUnavailableError
from hydro_slurm.slurm import BatchRequest, FakeSlurmClient, StepRequest
from hydro_slurm.slurm.fake import FakeStep


def test_time_is_handed_in() -> None:
    clock = ManualClock()
    slurm = FakeSlurmClient(clock)
    job_id = slurm.submit(BatchRequest(argv=["sleep", "100"]))
    assert slurm.job(job_id).state == "RUNNING"
    clock.advance(99.0)
    assert slurm.job(job_id).state == "RUNNING"
    clock.advance(1.0)
    assert slurm.job(job_id).state == "COMPLETED"


def test_time_limits_end_jobs_and_their_steps() -> None:
    slurm = FakeSlurmClient()
    job_id = slurm.submit(BatchRequest(argv=["train"], time_limit_s=60))
    assert slurm.wait_job(job_id, timeout_s=1.0, states={"RUNNING"}) == "RUNNING"
    step = slurm.launch_step(StepRequest(job_id=job_id, node="n1", argv=["bundle"]))
    assert slurm.wait_job(job_id, timeout_s=100.0) == "TIMEOUT"
    assert step.state() == "CANCELLED"


def test_what_is_no_known_command_runs_until_it_is_ended(tmp_path: Path) -> None:
    seen: list[FakeStep] = []
    slurm = FakeSlurmClient(on_step=seen.append)
    job_id = slurm.submit(BatchRequest(argv=["train"]))
    assert slurm.wait_job(job_id, timeout_s=1.0, states={"RUNNING"}) == "RUNNING"
    step = slurm.launch_step(StepRequest(job_id=job_id, node="n1", argv=["bundle"], name="b"))
    assert seen == [step]
    assert slurm.launched == [step]
    with pytest.raises(SlurmUnavailableError):
        step.wait(1000.0)
    slurm.end_step(step.step_id, exit_code=75)
    assert (step.poll(), step.state(), slurm.steps(job_id)) == (75, "FAILED", [])
    slurm.end_job(job_id)
    assert slurm.job(job_id).state == "COMPLETED"


def test_nodes_are_filled_by_cpus_and_memory_in_order_of_submission() -> None:
    slurm = FakeSlurmClient(num_nodes=2, cpus=2, memory_mib=1000)
    first = slurm.submit(BatchRequest(argv=["train"], nodes=2, mem_mib=600))
    blocked = slurm.submit(BatchRequest(argv=["train"], mem_mib=600))
    behind = slurm.submit(BatchRequest(argv=["train"], mem_mib=10))
    assert [slurm.job(job_id).state for job_id in (first, blocked, behind)] == ["RUNNING", "PENDING", "PENDING"]
    assert slurm.job(blocked).reason == "Resources"
    assert {node.state for node in slurm.nodes()} == {"MIXED"}
    slurm.end_job(first)
    assert [slurm.job(job_id).state for job_id in (first, blocked, behind)] == ["COMPLETED", "RUNNING", "RUNNING"]


def test_it_can_be_away_or_missing() -> None:
    slurm = FakeSlurmClient()
    job_id = slurm.submit(BatchRequest(argv=["train"]))
    slurm.unavailable = True
    with pytest.raises(SlurmUnavailableError):
        slurm.jobs()
    step = slurm.launch_step(StepRequest(job_id=job_id, node="n1", argv=["bundle"]))
    assert (step.state(), "Unable to contact" in step.message()) == ("FAILED", True)
    slurm.unavailable = False
    assert [job.job_id for job in slurm.jobs()] == [job_id]
    slurm.missing = True
    with pytest.raises(SlurmMissingError):
        slurm.launch_step(StepRequest(job_id=job_id, node="n1", argv=["bundle"]))
