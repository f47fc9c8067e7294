from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hydro_sim.scenario import ScenarioFile, read_scenario

SMALL = """
name = "small"
seed = 3
partitions = [{ name = "gpu", nodes = 6, devices_per_node = 8 }]

[bubbles]
throughput_share = 0.15
source = "assumed"

[[hosts]]
name = "gpt"
count = 2
devices = 16
duration_h = 20.0
over_h = 4.0
checkpoint_every_s = 600.0

[[studies]]
name = "tune"
count = 3
user = "user-{n}"
over_h = 3.0
trials = 20
steps = 2000
rungs = [0.1, 0.5, 1.0]
eta = 3
curve = [[1, 1.0], [8, 4.0], [16, 5.0]]
max_lanes = 16
top_k = 2
target_steps = 500
target_curve = [[1, 0.5]]

[trace]
format = "generated"
jobs = 300
load = 0.3
"""


@pytest.fixture
def scenario_file(tmp_path: Path) -> Callable[..., ScenarioFile]:
    """Writes a scenario and reads it back."""

    def write(text: str = SMALL, name: str = "scenario.toml") -> ScenarioFile:
        path = tmp_path / name
        path.write_text(text)
        return read_scenario(path)

    return write
