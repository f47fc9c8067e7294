"""Fixtures that need a real Slurm: one private cluster for the whole run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from hydro_slurm.testbed import Testbed, TestbedSpec
from hydro_slurm.testbed.machines import missing_programs

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So it is in a background job of a shell, and every child would inherit it: tests send Ctrl-C to theirs.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def need_slurm() -> None:
    """Skip the test where no Slurm is installed; fail it where HYDRO_REQUIRE_SLURM=1 says that there must be one."""
    missing = missing_programs()
    if not missing:
        return
    reason = f"no real Slurm here: {', '.join(missing)} not installed"
    if os.environ.get("HYDRO_REQUIRE_SLURM") == "1":
        pytest.fail(f"{reason}, and HYDRO_REQUIRE_SLURM=1")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def slurm_installed() -> None:
    """For tests that start a cluster of their own."""
    need_slurm()


@pytest.fixture(scope="session")
def testbed(slurm_installed: None) -> Iterator[Testbed]:
    """A private cluster of four nodes with two CPUs each, shared by all tests of this run: leave it as it was."""
    with Testbed.up(TestbedSpec(nodes=4, cpus=2, memory_mib=4096), ephemeral=True) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def user(testbed: Testbed) -> str:
    """The ordinary user, not root where there is a choice, who submits jobs in tests."""
    return testbed.ordinary_user()
