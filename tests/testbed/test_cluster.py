"""A private cluster as its users see it."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hydro_slurm.errors import TestbedError
from hydro_slurm.slurm import BatchRequest
from hydro_slurm.testbed import Testbed, TestbedSpec
from hydro_slurm.testbed import record as records

TIMEOUT_S = 30.0


def eventually(check: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not check():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.05)


def outside() -> dict[str, object]:
    """What a testbed must not change on the machine around it."""
    folders = [Path(name) for name in ("/etc/slurm", "/etc/munge", "/run", "/run/munge", "/run/hydro")]
    listings = {str(folder): sorted(folder.iterdir()) if os.access(folder, os.R_OK) else None for folder in folders}
    return {"mounts": Path("/proc/self/mounts").read_text(), "hostname": os.uname().nodename, **listings}


def test_every_node_is_idle_and_as_asked(testbed: Testbed) -> None:
    status = testbed.status()
    assert status.phase == "up"
    assert status.ephemeral
    assert [(node.name, node.state, node.cpus, node.memory_mib) for node in status.nodes] == [
        (name, "IDLE", 2, 4096) for name in ("n1", "n2", "n3", "n4")
    ]
    # At least the holders of 4 nodes, login and controller; 4 slurmds, slurmctld, munged.
    assert status.num_processes >= 12


def test_jobs_run_on_all_nodes_as_the_ordinary_user(testbed: Testbed, user: str) -> None:
    done = testbed.run(["srun", "-N4", "sh", "-c", "echo $(hostname) $SLURMD_NODENAME $(id -un)"], user=user)
    assert sorted(done.stdout.splitlines()) == [f"n{number} n{number} {user}" for number in range(1, 5)]


def test_more_cpus_than_the_machine_has_are_possible(base: Path) -> None:
    with Testbed.up(TestbedSpec(nodes=1, cpus=64, memory_mib=1_000_000), ephemeral=True) as testbed:
        assert testbed.run(["srun", "-n64", "--mem=900000", "sh", "-c", "echo x"]).stdout == "x\n" * 64


def test_node_names_resolve_everywhere(testbed: Testbed, user: str) -> None:
    argv = ["srun", "-w", "n2", "getent", "hosts", "n1", "n4"]
    lines = testbed.run(argv, user=user).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["127.0.0.1", "127.0.0.1"]


def test_a_job_without_the_callers_environment_still_finds_its_cluster(testbed: Testbed, user: str) -> None:
    output = testbed.shared_dir / "homes" / user / "clean.txt"
    request = BatchRequest(
        script="#!/bin/sh\n/usr/bin/env -i PATH=$PATH squeue --noheader -o %A\n",
        output=output,
        extra_options=["--export=NONE"],
    )
    client = testbed.client(user)
    job_id = client.submit(request)
    assert client.wait_job(job_id, timeout_s=TIMEOUT_S) == "COMPLETED"
    assert str(job_id) in output.read_text().split()


@pytest.mark.parametrize("folder", ["/dev/shm", "/run/hydro"])
def test_a_node_cannot_open_the_page_of_another(testbed: Testbed, user: str, folder: str) -> None:
    page = f"{folder}/page-of-n1"
    owner = user if folder == "/dev/shm" else testbed.caller  # /run/hydro is root's, as on a real node
    client = testbed.client(owner)
    home = testbed.shared_dir / "homes" / owner
    script = f"#!/bin/sh\numask 000\necho secret > {page}\nsleep 600\n"
    writer = client.submit(BatchRequest(script=script, node_list=["n1"], mem_mib=10, output=home / "writer.txt"))
    try:
        reads = ["test", "-r", page]
        eventually(lambda: testbed.run(reads, node="n1", check=False).returncode == 0, f"{page} on n1")
        results = {}
        for node in ("n1", "n2"):
            output = home / f"reader-{node}.txt"
            argv = ["sh", "-c", f"cat {page} && echo opened || echo refused"]
            reader = client.submit(BatchRequest(argv=argv, node_list=[node], mem_mib=10, output=output))
            assert client.wait_job(reader, timeout_s=TIMEOUT_S) == "COMPLETED"
            results[node] = output.read_text().split()
        assert results["n1"] == ["secret", "opened"]
        assert results["n2"][-1] == "refused"
        assert "secret" not in results["n2"]
        assert testbed.run(reads, check=False).returncode == 1, "the login machine sees n1's memory"
        assert not Path(page).exists(), "the machine outside sees n1's memory"
    finally:
        client.cancel(writer)
        client.wait_job(writer, timeout_s=TIMEOUT_S)
        testbed.run(["rm", "-f", page], node="n1")


def test_several_testbeds_live_side_by_side_and_leave_the_machine_alone(base: Path) -> None:
    before = outside()
    with Testbed.up(TestbedSpec(nodes=1, name="one"), ephemeral=True) as one:
        with Testbed.up(TestbedSpec(nodes=2, name="two", gres="gpu:2"), ephemeral=True) as two:
            assert outside() == before
            assert one.run(["sinfo", "-hN", "-o", "%N"]).stdout.split() == ["n1"]
            assert two.run(["sinfo", "-hN", "-o", "%N"]).stdout.split() == ["n1", "n2"]
            job_id = two.client().submit(BatchRequest(argv=["sleep", "600"], nodes=2))
            two.client().wait_job(job_id, timeout_s=TIMEOUT_S, states={"RUNNING"})
            assert one.client().jobs() == []
            with pytest.raises(TestbedError, match="'one' exists already"):
                Testbed.up(TestbedSpec(name="one"))
            with pytest.raises(TestbedError, match=r"2 testbeds are up \(one, two\)"):
                Testbed.load()
        assert one.run(["srun", "hostname"]).stdout == "n1\n"
        assert Testbed.load().name == "one"
    assert outside() == before


def test_a_strict_umask_of_the_creator_shuts_nobody_out(base: Path) -> None:
    before = os.umask(0o077)
    try:
        with Testbed.up(TestbedSpec(nodes=1, base=base / "sub"), ephemeral=True) as testbed:
            user = testbed.ordinary_user()
            client = testbed.client(user)
            job_id = client.submit(BatchRequest(argv=["sh", "-c", "umask > umask.txt"]))
            assert client.wait_job(job_id, timeout_s=TIMEOUT_S) == "COMPLETED"
    finally:
        os.umask(before)


@pytest.mark.parametrize("index", [0, 2])
def test_a_port_that_was_taken_in_between_is_replaced(base: Path, monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    choose = records.free_ports
    calls: list[tuple[int, ...]] = []
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()

        def unlucky(folder: Path, count: int) -> tuple[int, ...]:
            ports = list(choose(folder, count))
            if not calls:
                ports[index] = taken.getsockname()[1]
            calls.append(tuple(ports))
            return calls[-1]

        monkeypatch.setattr(records, "free_ports", unlucky)
        with Testbed.up(TestbedSpec(nodes=2), ephemeral=True) as testbed:
            assert testbed.run(["srun", "-N2", "echo", "hi"]).stdout == "hi\nhi\n"
    assert len(calls) == 2


def test_gres_are_given_to_jobs(base: Path) -> None:
    with Testbed.up(TestbedSpec(nodes=2, gres="gpu:2,bubble:g0:1,bubble:g1:1"), ephemeral=True) as testbed:
        assert {node.gres for node in testbed.client().nodes()} == {"gpu:2,bubble:g0:1,bubble:g1:1"}
        user = testbed.ordinary_user()
        shown = testbed.run(["srun", "-N2", "--gres=gpu:2", "printenv", "CUDA_VISIBLE_DEVICES"], user=user).stdout
        assert shown == "0,1\n0,1\n"
        assert testbed.run(["srun", "--gres=bubble:g1:1", "true"], user=user).returncode == 0
        refused = testbed.run(["srun", "--gres=bubble:g2:1", "true"], user=user, check=False)
        assert refused.returncode != 0


def test_commands_report_failure_output_and_time(testbed: Testbed, user: str) -> None:
    done = testbed.run(["sh", "-c", "cat; echo oops >&2; exit 4"], user=user, check=False, stdin="input")
    assert (done.returncode, done.stdout, done.stderr) == (4, "input", "oops\n")
    with pytest.raises(TestbedError, match=r"exited 4.*: oops"):
        testbed.run(["sh", "-c", "echo oops >&2; exit 4"], user=user)
    with pytest.raises(TestbedError, match="did not end within"):
        testbed.run(["sleep", "600"], timeout_s=0.2)
    with pytest.raises(TestbedError, match=r"no node 'n9'.*n1, n2, n3, n4"):
        testbed.run(["true"], node="n9")
    with pytest.raises(TestbedError, match="no user 'nosuchuser'"):
        testbed.run(["true"], user="nosuchuser")


def test_a_users_home_is_shared_and_his_own(testbed: Testbed, user: str) -> None:
    home = testbed.shared_dir / "homes" / user
    assert testbed.run(["sh", "-c", "pwd; echo $HOME $USER"], user=user).stdout.split() == [str(home), str(home), user]
    testbed.run(["sh", "-c", "echo written > note"], user=user)
    assert testbed.run(["cat", "note"], user=user, node="n3").stdout == "written\n"


def test_jobs_can_run_this_python_with_this_package(testbed: Testbed, user: str) -> None:
    code = "import hydro_slurm, sys; print(hydro_slurm.__file__)"
    done = testbed.run(["srun", "-N2", sys.executable, "-c", code], user=user)
    assert len(set(done.stdout.split())) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="the whole suite runs as an ordinary user already")
def test_an_ordinary_user_can_run_a_testbed(testbed: Testbed, user: str) -> None:
    code = (
        "import tempfile, json; from hydro_slurm.testbed import *\n"
        "from pathlib import Path\n"
        "base = Path(tempfile.mkdtemp(prefix='hydro-', dir='/tmp')); base.chmod(0o755)\n"
        "with Testbed.up(TestbedSpec(nodes=2, base=base), ephemeral=True) as t:\n"
        "    out = t.run(['srun', '-N2', 'sh', '-c', 'id -un; grep CapEff /proc/self/status']).stdout.split()\n"
        "    t.run(['srun', '-wn1', '-N1', 'touch', '/dev/shm/page'])\n"
        "    seen = [t.run(['test', '-e', '/dev/shm/page'], node=n, check=False).returncode for n in t.nodes]\n"
        "import shutil; shutil.rmtree(base)\n"
        "print(json.dumps([out, seen]))\n"
    )
    out, seen = json.loads(testbed.run([sys.executable, "-c", code], user=user).stdout)
    assert sorted(out) == sorted([user, "CapEff:", "0000000000000000"] * 2)
    assert seen == [0, 1]
