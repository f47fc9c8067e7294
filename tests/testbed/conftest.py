"""A folder for testbeds that a test starts itself."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hydro_slurm.testbed import list_testbeds


@pytest.fixture
def base(slurm_installed: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty base folder (short: sockets lie in it) that testbeds started in this test use; ends with nothing up."""
    folder = Path(tempfile.mkdtemp(prefix="hydro-"))
    folder.chmod(0o755)
    monkeypatch.setenv("HYDRO_TESTBED_DIR", str(folder))
    yield folder
    for left in list_testbeds(folder):
        left.down()
    shutil.rmtree(folder)
