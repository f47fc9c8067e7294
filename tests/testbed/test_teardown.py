"""Nothing of a testbed outlives it: after `down`, Ctrl-C, SIGKILL of its creator, a failed start, or a crash."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hydro_slurm.errors import TestbedError
from hydro_slurm.slurm import BatchRequest
from hydro_slurm.testbed import Testbed, TestbedSpec, list_testbeds
from hydro_slurm.testbed import record as records
from hydro_slurm.testbed.machines import spawn
from hydro_slurm.testbed.processes import Process, kill_members, members, wait_dead
from hydro_slurm.testbed.record import TestbedRecord
from hydro_slurm.testbed.teardown import take_down

TIMEOUT_S = 30.0

CREATOR = """
import sys, time
from pathlib import Path
from hydro_slurm.testbed import Testbed, TestbedSpec
with Testbed.up(TestbedSpec(nodes=2, name=sys.argv[1]), ephemeral=sys.argv[2] == "ephemeral") as testbed:
    testbed.run(["sbatch", "--wrap", "srun sleep 600"], user=testbed.ordinary_user())
    print("up", flush=True)
    if sys.argv[2] != "ephemeral":
        import os
        os._exit(0)
    time.sleep(600)
"""

STUBBORN = """#!/bin/sh
trap '' TERM INT HUP
(setsid sh -c 'trap "" TERM; echo $$ > "$0/orphan.pid"; while :; do sleep 600; done' "$PWD" &) &
sh -c 'echo $$ > "$0/stopped.pid"; kill -STOP $$; sleep 600' "$PWD" &
echo $$ > batch.pid
while :; do sleep 600; done
"""


def eventually(check: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not check():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.02)


def naming(text: str) -> list[str]:
    """Command lines of all living processes in which this text occurs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in command and int(path.parent.name) != os.getpid():
            found.append(command)
    return found


def start_creator(base: Path, name: str, kind: str = "ephemeral") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CREATOR, name, kind],
        env={**os.environ, "HYDRO_TESTBED_DIR": str(base)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_up(creator: subprocess.Popen[str]) -> None:
    assert creator.stdout is not None
    assert creator.stdout.readline() == "up\n", creator.stderr.read() if creator.stderr else ""


def assert_nothing_left(base: Path, uuid: str) -> None:
    """No process, and no folder, without anybody's help: so this may take a moment."""
    eventually(lambda: members(uuid) == [], "every process has ended")
    eventually(lambda: naming(str(base)) == [], "nobody works on the base folder")
    assert [path.name for path in base.iterdir() if path.name != ".lock"] == []


def test_down_ends_orphans_stopped_and_stubborn_processes(base: Path) -> None:
    testbed = Testbed.up(TestbedSpec(nodes=2), ephemeral=True)
    user = testbed.ordinary_user()
    record = records.load(testbed.state_dir)
    home = testbed.shared_dir / "homes" / user
    client = testbed.client(user)
    client.submit(BatchRequest(script=STUBBORN, work_dir=home))
    files = [home / f"{name}.pid" for name in ("orphan", "stopped", "batch")]
    eventually(lambda: all(path.exists() and path.read_text().strip() for path in files), "the job's processes run")
    processes = [Process.of(int(path.read_text())) for path in files]
    login_side = testbed.popen(["sh", "-c", "trap '' TERM; while :; do sleep 600; done"], user=user)
    eventually(lambda: len(processes) == 3 and all(process.alive() for process in processes), "they are alive")
    found = {process.pid for process in members(record.uuid)}
    assert {process.pid for process in processes} <= found
    assert login_side.pid in found
    testbed.down()
    assert members(record.uuid) == []
    assert not any(process.alive() for process in processes)
    assert login_side.wait(5.0) == -signal.SIGKILL
    assert record.guardian is not None
    assert not record.guardian.alive()
    assert naming(str(base)) == []
    assert not testbed.state_dir.exists()
    testbed.down()  # a second time is no error


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a mount namespace inside a node")
def test_down_ends_processes_in_namespaces_of_their_own(base: Path) -> None:
    with Testbed.up(TestbedSpec(nodes=1), ephemeral=True) as testbed:
        hidden = testbed.popen(["unshare", "--mount", "--", "sleep", "600"], node="n1")
        space = Path(f"/proc/{hidden.pid}/ns/mnt")
        node_space = Path(f"/proc/{records.load(testbed.state_dir).holders['n1'].pid}/ns/mnt").readlink()
        eventually(lambda: space.readlink() not in (Path("/proc/self/ns/mnt").readlink(), node_space), "it has its own")
    assert hidden.wait(5.0) == -signal.SIGKILL


def test_a_process_on_its_way_into_a_namespace_is_found(tmp_path: Path) -> None:
    child = spawn(["sleep", "600"], tmp_path / "log", uuid="uuid-of-this-test")
    with child:
        assert members("uuid-of-this-test") == [Process.of(child.pid)]
        assert members("uuid-of-this") == []
        kill_members("uuid-of-this-test", first=[])
        assert child.wait(5.0) == -signal.SIGKILL


def test_down_ends_nobody_elses_process(base: Path) -> None:
    testbed = Testbed.up(TestbedSpec(nodes=1), ephemeral=True)
    record = records.load(testbed.state_dir)
    with subprocess.Popen(["sleep", "600"]) as bystander:
        # As if pids had been used again: the record names a process that is another one now.
        wrong = Process(bystander.pid, Process.of(bystander.pid).start_ticks - 1)
        daemons = {**record.daemons, "stranger": wrong}
        records.save(testbed.state_dir, dataclasses.replace(record, daemons=daemons))
        testbed.down()
        assert Process.of(bystander.pid).alive()
        bystander.kill()
    assert members(record.uuid) == []


def test_sigkill_of_the_creator_takes_an_ephemeral_testbed_down(base: Path) -> None:
    creator = start_creator(base, "doomed")
    wait_up(creator)
    uuid = records.load(base / "doomed").uuid
    assert members(uuid)
    creator.kill()
    creator.communicate()
    assert_nothing_left(base, uuid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_creator_takes_an_ephemeral_testbed_down(base: Path, number: signal.Signals) -> None:
    creator = start_creator(base, "doomed")
    wait_up(creator)
    uuid = records.load(base / "doomed").uuid
    os.killpg(creator.pid, number)  # to the whole group, as a terminal does
    creator.communicate(timeout=TIMEOUT_S)
    assert_nothing_left(base, uuid)


def test_a_creator_that_is_killed_while_ending_its_testbed_leaves_nothing(base: Path) -> None:
    creator = start_creator(base, "doomed")
    wait_up(creator)
    record = records.load(base / "doomed")
    creator.send_signal(signal.SIGINT)
    deadline = time.monotonic() + TIMEOUT_S
    while record.daemons["slurmctld"].alive():  # without a pause: the moment is short
        assert time.monotonic() < deadline, "not in time: slurmctld ends"
    creator.kill()
    creator.communicate(timeout=TIMEOUT_S)
    assert_nothing_left(base, record.uuid)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize(
    ("kind", "reached"),
    [
        ("ephemeral", "record"),
        ("ephemeral", "guardian"),
        ("ephemeral", "holders"),
        ("ephemeral", "slurmctld"),
        ("lasting", "guardian"),
        ("lasting", "n2"),
    ],
)
def test_a_creator_that_dies_while_starting_leaves_nothing(
    base: Path, kind: str, reached: str, number: signal.Signals
) -> None:
    creator = start_creator(base, "doomed", kind)
    state = base / "doomed"
    checks: dict[str, Callable[[TestbedRecord], bool]] = {
        "record": lambda record: True,
        "guardian": lambda record: record.guardian is not None,
        "holders": lambda record: bool(record.holders),
        "slurmctld": lambda record: "slurmctld" in record.daemons,
        "n2": lambda record: "n2" in record.daemons,
    }
    found: list[TestbedRecord] = []

    def there() -> bool:
        try:
            record = records.load(state)
        except TestbedError:
            return False
        found[:] = [record]
        return checks[reached](record)

    deadline = time.monotonic() + TIMEOUT_S
    while not there():
        assert time.monotonic() < deadline, f"not in time: {reached}"
    creator.send_signal(number)
    creator.communicate(timeout=TIMEOUT_S)
    if reached == "record" or (kind == "lasting" and found[0].phase == "up"):
        list_testbeds(base)  # killed before it had a guardian: the next one who looks cleans up
        for left in list_testbeds(base):  # finished before the signal came
            left.down()
    assert_nothing_left(base, found[0].uuid)


def test_a_lasting_testbed_outlives_its_creator_until_anybody_ends_it(base: Path) -> None:
    creator = start_creator(base, "lasting", "lasting")
    wait_up(creator)
    assert creator.wait(TIMEOUT_S) == 0
    testbed = Testbed.load("lasting")
    assert not testbed.status().ephemeral
    assert testbed.run(["srun", "-N1", "--overcommit", "hostname"]).stdout.strip() in testbed.nodes
    (again,) = list_testbeds(base)
    assert again.name == "lasting"
    uuid = records.load(testbed.state_dir).uuid
    testbed.down()
    assert members(uuid) == []
    assert_nothing_left(base, uuid)
    with pytest.raises(TestbedError, match="no testbed called 'lasting'"):
        Testbed.load("lasting")


def test_a_testbed_whose_processes_are_gone_is_cleaned_up(base: Path) -> None:
    testbed = Testbed.up(TestbedSpec(nodes=1, name="crashed"))
    record = records.load(testbed.state_dir)
    survivor = testbed.popen(["sleep", "600"], node="n1")
    eventually(lambda: survivor.pid in {process.pid for process in members(record.uuid)}, "it has entered")
    for holder in record.holders.values():
        holder.send(signal.SIGKILL)
    assert wait_dead(list(record.holders.values()), TIMEOUT_S)
    assert list_testbeds(base) == []
    assert survivor.wait(TIMEOUT_S) == -signal.SIGKILL
    assert_nothing_left(base, record.uuid)


def test_a_testbed_of_another_boot_is_cleaned_up_without_touching_a_process(base: Path) -> None:
    testbed = Testbed.up(TestbedSpec(nodes=1, name="old"), ephemeral=True)
    record = records.load(testbed.state_dir)
    with subprocess.Popen(["sleep", "600"]) as bystander:
        ghosts = {"n1": Process.of(bystander.pid)}
        old = dataclasses.replace(record, boot_id="another boot", holders=ghosts, daemons=ghosts)
        testbed.down()
        state = records.claim(base, old)
        with Testbed.up(TestbedSpec(nodes=1, name="old"), ephemeral=True) as fresh:
            assert fresh.state_dir == state
            assert records.load(state).uuid != record.uuid
        assert Process.of(bystander.pid).alive()
        bystander.kill()


def test_a_failed_start_leaves_nothing_and_quotes_the_log(base: Path) -> None:
    with pytest.raises(TestbedError, match=r"(?s)slurmctld ended with status 1.*end of its log:.*Nonsense") as caught:
        Testbed.up(TestbedSpec(nodes=2, name="failing", extra_conf=("Nonsense=1",)))
    assert len(str(caught.value).splitlines()) <= 13
    assert naming("hydro-testbed failing") == []
    assert naming(str(base)) == []
    assert [path.name for path in base.iterdir() if path.name != ".lock"] == []


def test_a_node_that_does_not_come_up_is_named(base: Path) -> None:
    # A node without a slurmd: one more than is started.
    line = "NodeName=n9 NodeAddr=127.0.0.1 Port=1 CPUs=1 RealMemory=100 State=UNKNOWN"
    with pytest.raises(TestbedError, match="n9"):
        Testbed.up(TestbedSpec(nodes=1, extra_conf=(line, "PartitionName=other Nodes=n9"), start_timeout_s=2.0))
    assert naming(str(base)) == []


def test_what_an_interrupted_removal_left_is_removed_later(base: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    for kind in ("new", "old"):
        (base / f".{kind}-{dead.pid}-x").mkdir()
    (base / f".old-{os.getpid()}-y").mkdir()
    list_testbeds(base)
    assert sorted(path.name for path in base.glob(".*-*")) == [f".old-{os.getpid()}-y"]


def test_a_path_too_long_for_sockets_is_refused(base: Path) -> None:
    deep = base / ("x" * 80)
    with pytest.raises(TestbedError, match="too long for the sockets"):
        Testbed.up(TestbedSpec(nodes=1, base=deep))
    assert list(deep.glob("[!.]*")) == []


def test_a_folder_of_somebody_else_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TestbedError, match="HYDRO_TESTBED_DIR"):
        Testbed.up(TestbedSpec(base=Path("/proc/nowhere")))


def test_taking_down_what_is_not_there_is_an_error(base: Path) -> None:
    with pytest.raises(TestbedError, match="no testbed called 'absent'"):
        take_down(base / "absent")
