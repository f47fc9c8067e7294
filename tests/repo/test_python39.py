"""tools/python39.py: what Python 3.9 cannot run."""

from __future__ import annotations

import pytest
from python39 import python39_offences

FUTURE = "from __future__ import annotations\n"


@pytest.mark.parametrize(
    "source",
    [
        "match x:\n    case 1:\n        pass",
        "from enum import StrEnum",
        "import tomllib",
        "import typing\ntyping.assert_never(1)",
        "from typing import Self",
        "zip(a, b, strict=True)",
        "Number = int | float",
        "Path_or_none = Path | None",
        "isinstance(x, list[int] | None)",
        "from dataclasses import dataclass\n@dataclass(frozen=True, slots=True)\nclass A:\n    pass",
        "import dataclasses\n@dataclasses.dataclass(kw_only=True)\nclass A:\n    pass",
        "def f(x: int | None) -> None: ...",
        FUTURE + "class A:\n    FORMAT: ClassVar[str] = 'a'\nclass B:\n    field: int | None",
    ],
)
def test_newer_than_39_is_found(source: str) -> None:
    assert list(python39_offences(source)) != []


@pytest.mark.parametrize(
    "source",
    [
        FUTURE + "def f(x: int | None) -> list[int]: ...",
        FUTURE + "class A:\n    FORMAT: ClassVar[str] = 'a'\n    field: Optional[int]",
        "flags = os.O_RDWR | os.O_CREAT",
        "names = {'a'} | {'b'}",
        "zip(a, b)",
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass A:\n    pass",
    ],
)
def test_python_39_passes(source: str) -> None:
    assert list(python39_offences(source)) == []


def test_line_of_the_offence_is_given() -> None:
    ((line, message),) = python39_offences(FUTURE + "\nimport tomllib\n")
    assert (line, message) == (3, "module tomllib")
