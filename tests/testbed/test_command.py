"""`hydro testbed`, and what tests do where there is no Slurm."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hydro_slurm.cli import testbed as command
from hydro_slurm.errors import ConfigError, TestbedError


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["testbed", *words])
    status: int = arguments.func(arguments)
    return status


def test_a_testbed_is_started_shown_used_and_stopped(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("status") == 0
    assert capfd.readouterr().out == "no testbed is up\n"
    assert run("up", "--nodes", "2", "--cpus", "3", "--memory-mib", "900", "--gres", "gpu:1", "--name", "mine") == 0
    shown = capfd.readouterr().out
    assert "mine: up, Slurm " in shown
    assert "n2  idle  3 CPUs, 900 MiB, gpu:1" in shown
    assert f"SLURM_CONF={base}/mine/conf/slurm.conf" in shown

    assert run("status", "--json") == 0
    (status,) = json.loads(capfd.readouterr().out)
    assert (status["name"], status["phase"], status["ephemeral"]) == ("mine", "up", False)
    assert [(node["name"], node["cpus"], node["gres"]) for node in status["nodes"]] == [
        ("n1", 3, "gpu:1"),
        ("n2", 3, "gpu:1"),
    ]

    words = ["exec", "--node", "n2", "--", "sh", "-c", "hostname; exit 5"]
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_command as t; t.run(*{words})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (5, "n2\n"), done.stderr

    assert run("down") == 0
    assert capfd.readouterr().out == "testbed mine is down\n"
    with pytest.raises(TestbedError, match="0 testbeds are up"):
        run("down")
    with pytest.raises(TestbedError, match="no testbed called 'mine'"):
        run("status", "--name", "mine")


def test_wrong_sizes_are_refused(base: Path) -> None:
    with pytest.raises(ConfigError, match="nodes"):
        run("up", "--nodes", "0")


@pytest.mark.parametrize("required", [True, False])
def test_without_slurm_tests_skip_unless_it_is_required(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, required: bool
) -> None:
    conftest = request.config.pluginmanager.get_plugin(str(Path(__file__).parents[1] / "conftest.py"))
    assert conftest is not None
    monkeypatch.setattr(conftest, "missing_programs", lambda: ["slurmctld"])
    monkeypatch.setenv("HYDRO_REQUIRE_SLURM", "1" if required else "")
    with pytest.raises(pytest.fail.Exception if required else pytest.skip.Exception, match="slurmctld not installed"):
        conftest.need_slurm()
