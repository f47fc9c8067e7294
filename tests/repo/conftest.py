"""The check tools are scripts in tools/, not a package: tests import them from there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))


@pytest.fixture
def root() -> Path:
    """The checkout that these tests lie in."""
    return ROOT
