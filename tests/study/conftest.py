from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from hydro_slurm.testbed import Testbed

sys.path.insert(0, str(Path(__file__).parent))

from workbench import Workbench


@pytest.fixture
def desk(testbed: Testbed, user: str) -> Iterator[Workbench]:
    bench = Workbench(testbed, user, uuid.uuid4().hex[:8])
    yield bench
    bench.clear()
