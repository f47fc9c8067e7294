from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hydro_slurm.testbed import Testbed

sys.path.insert(0, str(Path(__file__).parent))

from workbench import Workbench


@pytest.fixture
def desk(testbed: Testbed, user: str, request: pytest.FixtureRequest) -> Iterator[Workbench]:
    bench = Workbench(testbed, user, request.node.name.replace("[", "-").replace("]", ""))
    yield bench
    bench.clear()
