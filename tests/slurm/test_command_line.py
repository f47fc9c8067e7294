"""What only the command-line client can show: missing commands, an absent slurmctld, steps from within a job."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hydro_slurm.clock import SystemClock
from hydro_slurm.errors import SlurmCommandError, SlurmMissingError, SlurmNotFoundError, SlurmUnavailableError
from hydro_slurm.slurm import BatchRequest, CommandLineClient, StepRequest
from hydro_slurm.slurm.launch import batch_options, step_command
from hydro_slurm.testbed import Testbed, TestbedSpec

TIMEOUT_S = 30.0
EVERY_CALL: dict[str, Callable[[CommandLineClient], object]] = {
    "version": lambda client: client.version(),
    "jobs": lambda client: client.jobs(),
    "job": lambda client: client.job(1),
    "steps": lambda client: client.steps(1),
    "nodes": lambda client: client.nodes(),
    "partitions": lambda client: client.partitions(),
    "submit": lambda client: client.submit(BatchRequest(argv=["true"])),
    "launch_step": lambda client: client.launch_step(StepRequest(job_id=1, node="n1", argv=["true"])),
    "cancel": lambda client: client.cancel(1),
    "wait_job": lambda client: client.wait_job(1, timeout_s=1.0),
}

STEP_FROM_A_JOB = """
import sys
from hydro_slurm.slurm import CommandLineClient, StepRequest
job_id, node, output = int(sys.argv[1]), sys.argv[2], sys.argv[3]
step = CommandLineClient().launch_step(StepRequest(
    job_id=job_id, node=node, mem_mib=200, name="guest", output=output,
    argv=["sh", "-c", "echo $SLURM_JOB_ID $SLURMD_NODENAME $(hostname) $HYDRO_WORD"], env={"HYDRO_WORD": "heard"},
))
sys.exit(step.wait(60))
"""


@pytest.mark.parametrize("call", EVERY_CALL)
def test_missing_commands_are_told_apart(call: str, tmp_path: Path) -> None:
    with pytest.raises(SlurmMissingError, match="not on PATH"):
        EVERY_CALL[call](CommandLineClient(env={"PATH": str(tmp_path)}))


@pytest.mark.parametrize("call", sorted(EVERY_CALL.keys() - {"launch_step"}))
def test_missing_commands_are_told_apart_behind_a_prefix(call: str, tmp_path: Path) -> None:
    with pytest.raises(SlurmMissingError, match="not on PATH"):
        EVERY_CALL[call](CommandLineClient(prefix=["/usr/bin/env", f"PATH={tmp_path}"]))


def test_a_command_that_hangs_counts_as_unavailable(tmp_path: Path) -> None:
    hanging = tmp_path / "squeue"
    hanging.write_text("#!/bin/sh\nexec /bin/sleep 600\n")
    hanging.chmod(0o755)
    started = time.monotonic()
    with pytest.raises(SlurmUnavailableError, match=r"squeue.* 0\.2 s"):
        CommandLineClient(env={"PATH": str(tmp_path)}, timeout_s=0.2).jobs()
    assert time.monotonic() - started < 20.0


@pytest.mark.parametrize(
    ("stderr", "kind"),
    [
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", SlurmUnavailableError),
        ("squeue: error: Munge encode failed: Failed to access socket", SlurmUnavailableError),
        ("slurm_load_jobs error: Invalid job id specified", SlurmNotFoundError),
        ("squeue: error: Invalid user: nosuch", SlurmCommandError),
    ],
)
def test_errors_are_mapped(stderr: str, kind: type[Exception], tmp_path: Path) -> None:
    failing = tmp_path / "squeue"
    failing.write_text(f"#!/bin/sh\necho '{stderr}' >&2\nexit 1\n")
    failing.chmod(0o755)
    with pytest.raises(kind) as caught:
        CommandLineClient(env={"PATH": str(tmp_path)}).job(1)
    assert type(caught.value) is kind
    assert stderr in str(caught.value)


def test_output_of_another_layout_is_refused(tmp_path: Path) -> None:
    strange = tmp_path / "squeue"
    strange.write_text("#!/bin/sh\necho hello\n")
    strange.chmod(0o755)
    with pytest.raises(Exception, match="unexpected: 'hello'"):
        CommandLineClient(env={"PATH": str(tmp_path)}).jobs()


def test_user_defaults_do_not_change_the_answers(testbed: Testbed, user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = testbed.client(user)
    job_id = client.submit(BatchRequest(argv=["true"], name="plain"))
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    monkeypatch.setenv("SQUEUE_STATES", "PENDING")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    monkeypatch.setenv("SLURM_JOB_ID", "12345")
    fresh = testbed.client(user)
    assert fresh.wait_job(job_id, timeout_s=TIMEOUT_S) == "COMPLETED"
    job = fresh.job(job_id)
    assert job.name == "plain"
    assert job.submit_time_s is not None
    assert abs(job.submit_time_s - SystemClock().wall_s()) < 600


def test_options_of_a_batch_job() -> None:
    request = BatchRequest(
        argv=["true"],
        name="a",
        nodes=2,
        ntasks_per_node=1,
        cpus_per_task=3,
        mem_mib=100,
        time_limit_s=90,
        comment="hydro:share",
        output="/o/%j.txt",
        partition="train",
        node_list=["n1", "n2"],
        gres="gpu:1",
        work_dir="/w",
        requeue=True,
        extra_options=["--hold"],
    )
    assert batch_options(request) == [
        "--job-name=a",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=3",
        "--mem=100M",
        "--time=0-00:01:30",
        "--comment=hydro:share",
        "--output=/o/%j.txt",
        "--partition=train",
        "--nodelist=n1,n2",
        "--gres=gpu:1",
        "--chdir=/w",
        "--requeue",
        "--hold",
    ]
    assert batch_options(BatchRequest(argv=["true"])) == []


def test_options_of_a_step() -> None:
    request = StepRequest(job_id=4, node="n2", argv=["run", "-x"], name="b", mem_mib=50, output="/o/50%.txt")
    command = step_command(request)
    assert command[:2] == ["srun", "--overlap"]
    assert command[-3:] == ["--", "run", "-x"]
    assert {"--jobid=4", "--nodelist=n2", "--nodes=1", "--ntasks=1", "--mem=50M", "--output=/o/50%%.txt"} <= set(
        command
    )


def test_job_gets_its_environment_and_folder(testbed: Testbed, user: str) -> None:
    home = testbed.shared_dir / "homes" / user
    client = testbed.client(user)
    request = BatchRequest(
        script='#!/bin/sh\necho "$HYDRO_WORD" "$HOME"; pwd\n',
        env={"HYDRO_WORD": "a b,c=d"},
        output=home / "environment.txt",
        work_dir=home,
    )
    assert client.wait_job(client.submit(request), timeout_s=TIMEOUT_S) == "COMPLETED"
    assert (home / "environment.txt").read_text().splitlines() == [f"a b,c=d {home}", str(home)]


def test_job_of_another_node_runs_a_step_in_a_host_job(testbed: Testbed, user: str) -> None:
    client = testbed.client(user)
    output = testbed.shared_dir / "homes" / user / "guest.txt"
    # The host's own step holds all memory and CPUs of its allocation.
    host = client.submit(
        BatchRequest(
            script="#!/bin/sh\nexec srun --mem=1000 sleep 600\n",
            node_list=["n1", "n2"],
            nodes=2,
            ntasks_per_node=2,
            mem_mib=1000,
        )
    )
    try:
        assert client.wait_job(host, timeout_s=TIMEOUT_S, states={"RUNNING"}) == "RUNNING"
        argv = [sys.executable, "-c", STEP_FROM_A_JOB, str(host), "n2", str(output)]
        guest = client.submit(BatchRequest(argv=argv, node_list=["n3"], mem_mib=500))
        assert client.wait_job(guest, timeout_s=2 * TIMEOUT_S) == "COMPLETED"
        assert client.job(guest).nodes == ("n3",)
        assert output.read_text() == f"{host} n2 n2 heard\n"
        assert client.job(host).state == "RUNNING"
    finally:
        client.cancel(host)


def test_another_user_may_not_cancel(testbed: Testbed, user: str) -> None:
    if user == testbed.caller:
        pytest.skip("needs root: only root can submit jobs as somebody else")
    job_id = testbed.client().submit(BatchRequest(argv=["sleep", "600"], mem_mib=10))
    with pytest.raises(SlurmCommandError, match="permission"):
        testbed.client(user).cancel(job_id)
    testbed.client().cancel(job_id)
    assert testbed.client().wait_job(job_id, timeout_s=TIMEOUT_S) == "CANCELLED"


@pytest.fixture(scope="module")
def own_testbed(slurm_installed: None) -> Iterator[Testbed]:
    """A cluster whose slurmctld may be stopped."""
    with Testbed.up(TestbedSpec(nodes=2), ephemeral=True) as cluster:
        yield cluster


def test_an_absent_slurmctld_is_unavailable_and_comes_back(own_testbed: Testbed) -> None:
    user = own_testbed.ordinary_user()
    client = own_testbed.client(user, timeout_s=TIMEOUT_S)
    impatient = own_testbed.client(user, timeout_s=0.4)
    job_id = client.submit(BatchRequest(argv=["sleep", "600"], comment="hydro:share"))
    assert client.wait_job(job_id, timeout_s=TIMEOUT_S, states={"RUNNING"}) == "RUNNING"
    own_testbed.stop_controller()
    for call in ("jobs", "job", "steps", "nodes", "partitions", "submit", "cancel", "wait_job"):
        started = time.monotonic()
        with pytest.raises(SlurmUnavailableError):
            EVERY_CALL[call](impatient)
        assert time.monotonic() - started < 10.0, f"{call} did not keep to its timeout"
    assert own_testbed.status().slurm_version == ""
    own_testbed.start_controller()
    job = client.job(job_id)
    assert (job.state, job.comment) == ("RUNNING", "hydro:share")
    client.cancel(job_id)
    assert client.wait_job(job_id, timeout_s=TIMEOUT_S) == "CANCELLED"
