"""Results as pandas frames."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hydro_sim.cli import main
from hydro_sim.frames import read_frames
from hydro_sim.scenario import ScenarioFile
from hydro_slurm.errors import SimulationError


def test_frames_hold_what_the_tables_hold(scenario_file: Callable[..., ScenarioFile], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["run", str(scenario_file().path), "--output", str(out), "--json"]) == 0
    frames = read_frames(out)
    assert set(frames) == {"studies", "hosts", "bundles", "users", "partitions", "jobs"}
    for name, frame in frames.items():
        assert len(frame) == max(0, len((out / f"{name}.csv").read_text().splitlines()) - 1)
    studies = frames["studies"]
    assert studies["submit_h"].dtype.kind == "f"
    assert (studies["jct_h"].dropna() >= studies["queueing_delay_h"][studies["jct_h"].notna()]).all()


def test_a_folder_without_tables_is_named(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match=f"{tmp_path}: got no tables"):
        read_frames(tmp_path)
