"""What a testbed may be asked to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydro_slurm.errors import ConfigError
from hydro_slurm.testbed import TestbedSpec, default_exposed
from hydro_slurm.testbed.spec import Gres, parse_gres


def test_gres_are_read_as_slurm_writes_them() -> None:
    assert parse_gres("gpu:2,bubble:g0:1,nic") == (Gres("gpu", "", 2), Gres("bubble", "g0", 1), Gres("nic", "", 1))
    assert parse_gres("") == ()


@pytest.mark.parametrize("text", ["gpu:", "gpu:two:", "gpu:0", "2", "gpu:2:g0", "gpu:2 File=/etc/passwd", "gpu:9999"])
def test_wrong_gres_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="gres"):
        TestbedSpec(gres=text)


def test_wrong_sizes_and_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="nodes must lie between 1 and 64, got 0"):
        TestbedSpec(nodes=0)
    with pytest.raises(ConfigError, match="cpus"):
        TestbedSpec(cpus=0)
    with pytest.raises(ConfigError, match="memory_mib"):
        TestbedSpec(cpus=4, memory_mib=3)
    for name in ("", "../up", "a b", "-x", "x" * 33):
        with pytest.raises(ConfigError, match="name"):
            TestbedSpec(name=name)


def test_the_default_exposes_interpreter_and_package_and_never_everything() -> None:
    exposed = default_exposed()
    assert Path(__file__).parents[2] in exposed or any("site-packages" in str(path) for path in exposed)
    assert all(path.exists() and path != Path("/") for path in exposed)
