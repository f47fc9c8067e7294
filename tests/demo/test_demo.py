"""`hydro demo` as a whole: what its summary says is what Slurm said meanwhile, and Ctrl-C leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from hydro_slurm.errors import TestbedError
from hydro_slurm.testbed import Testbed, list_testbeds

T = TypeVar("T")

DEMO = [sys.executable, "-m", "hydro_slurm.cli.main", "demo"]


def wait_for(what: str, check: Callable[[], T | None], demo: subprocess.Popen[str], timeout_s: float = 240.0) -> T:
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = check()
        if found:
            return found
        assert demo.poll() is None, f"the demo ended while waiting for {what}"
        assert time.monotonic() < deadline_s, f"timed out waiting for {what}"
        time.sleep(0.2)


def descendants_of(base: Path) -> list[psutil.Process]:
    """Processes that have anything of this folder in their command line or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            texts = [*process.cmdline(), *process.environ().values()]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if any(str(base) in text for text in texts) and process.pid != os.getpid():
            found.append(process)
    return found


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory, slurm_installed: None) -> Iterator[Path]:
    """A folder of its own for the demo's testbed; every user may look into it."""
    # Not below pytest's own folders: those are closed to other users, and socket paths are short.
    folder = Path(f"/tmp/hydro-test-{os.getpid()}-{time.monotonic_ns() % 10**6}")
    folder.mkdir(mode=0o755)
    yield folder
    for testbed in list_testbeds(folder):
        testbed.down()
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if not path.is_dir() else path.rmdir()
    folder.rmdir()


def start_demo(base: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "HYDRO_TESTBED_DIR": str(base)}
    return subprocess.Popen(
        [*DEMO, f"--output={output}", *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def running_testbed(base: Path) -> Testbed | None:
    """The demo's testbed, as soon as all of it is up."""
    return next((testbed for testbed in list_testbeds(base) if testbed.status().phase == "up"), None)


def bundle_steps(testbed: Testbed) -> dict[str, tuple[str, str]]:
    """Bundle steps as plain squeue prints them: id to (name, node)."""
    done = testbed.run(["squeue", "--steps", "--noheader", "--format=%i %N %j"], check=False)
    rows = [line.split(None, 2) for line in done.stdout.splitlines()]
    return {row[0]: (row[2], row[1]) for row in rows if len(row) == 3 and row[2].startswith("hydro:")}


def test_summary_matches_what_slurm_says_meanwhile(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    demo = start_demo(base, output, "--trials=64", "--block-iterations=3")
    testbed = wait_for("the cluster", lambda: running_testbed(base), demo)
    seen: dict[str, tuple[str, str]] = {}
    jobs: dict[int, tuple[str, str, str]] = {}
    while demo.poll() is None:
        try:
            seen.update(bundle_steps(testbed))
            done = testbed.run(["squeue", "--noheader", "--format=%i %u %T %j"], check=False)
        except (OSError, TestbedError):
            break  # the demo has come to its end and takes its cluster down
        for line in done.stdout.splitlines():
            number, user, state, name = line.split(None, 3)
            jobs[int(number)] = (user, name, state)
        time.sleep(1.0)
    printed, _ = demo.communicate(timeout=120)
    assert demo.returncode == 0, printed
    summary = json.loads((output / "summary.json").read_text())
    host, study = summary["host"], summary["study"]
    assert set(jobs) == {host["job_id"], study["job_id"]}
    assert {user for user, _, _ in jobs.values()} == {summary["user"]}
    assert os.geteuid() != 0 or summary["user"] != "root"
    assert jobs[host["job_id"]][1] == "char-gpt"
    assert jobs[study["job_id"]][1] == "hydro:digits"
    said = {step["step"]: (step["name"], ",".join(step["nodes"])) for step in summary["evidence"]["bundle_steps"]}
    assert seen.items() <= said.items() or said.items() <= seen.items(), (seen, said)
    assert len(set(seen) & set(said)) >= 2
    assert all(step.startswith(f"{host['job_id']}.") for step in said)
    assert sum(study["trials"].values()) == 64
    assert study["trials"]["fail"] == 0
    assert study["best"] is not None
    assert study["verified"]
    assert study["verified"][0]["state"] == "COMPLETE"
    assert study["trial_steps_in_bubbles"] > 0
    assert set(host["iteration_ms"]) == {"alone", "bubbles", "colocated"}
    assert all(value > 0 for value in host["iteration_ms"].values())
    assert host["stages"] == 2
    assert 0 < host["bubble_ratio"] < 1
    assert host["slowdown_ci95"]["bubbles"][0] <= host["slowdown"]["bubbles"] <= host["slowdown_ci95"]["bubbles"][1]
    assert "bundles in its bubbles" in printed
    assert list_testbeds(base) == []
    assert descendants_of(base) == []


@pytest.mark.parametrize("moment", ["starting", "bundles"])
def test_ctrl_c_leaves_nothing_running(base: Path, tmp_path: Path, moment: str) -> None:
    demo = start_demo(base, tmp_path / "out", "--trials=24")
    testbed = wait_for("the cluster", lambda: running_testbed(base), demo)
    if moment == "bundles":
        wait_for("a bundle", lambda: bundle_steps(testbed), demo)
    os.killpg(demo.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    printed, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, printed
    assert printed.strip().splitlines()[-1] == "hydro: interrupted"
    assert "Traceback" not in printed
    assert descendants_of(base) == []
    assert list_testbeds(base) == []
    assert [path.name for path in base.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    ("options", "message"), [(["--nodes=2"], "--nodes must be at least 3"), (["--trials=0"], "--trials must be")]
)
def test_wrong_arguments_are_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    done = subprocess.run(
        [*DEMO, f"--output={tmp_path}/out", *options], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
