"""tools/check_docs.py and tools/format_tables.py find what they are for, and nothing in this checkout."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

import check_docs
import format_tables
import pytest


def make_parser() -> argparse.ArgumentParser:
    """`hydro study run --steps N FILE` and `hydro doctor`."""
    parser = argparse.ArgumentParser(prog="hydro")
    groups = parser.add_subparsers()
    study = groups.add_parser("study").add_subparsers()
    run = study.add_parser("run")
    run.add_argument("--steps", type=int)
    run.add_argument("file")
    submit = study.add_parser("submit")
    submit.add_argument("file")
    submit.set_defaults(takes_sbatch_options=True)
    groups.add_parser("doctor")
    return parser


def make_tree(root: Path, readme: str) -> Path:
    (root / "docs").mkdir()
    (root / "README.md").write_text(readme)
    (root / "docs" / "page.md").write_text(
        "# A page\n\n## What it is for\n\n```\n# no heading\n```\n\n## What it is for\n"
    )
    (root / "Makefile").write_text("python := python3\nhelp:\n\techo\ntest: help\n\techo\n")
    return root


def test_this_checkout_is_sound(root: Path) -> None:
    parsers = (check_docs.command_line_parser(root), check_docs.simulator_parser(root))
    assert check_docs.check(root, *parsers) == []


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("[a](docs/none.md)", "there is no docs/none.md"),
        ("[a](docs/page.md#nothing)", "has no heading #nothing"),
        ("[a](docs/page.md#no-heading)", "has no heading #no-heading"),
        ("[a](docs/page.md#what-it-is-for-2)", "has no heading"),
        ("[a](#nowhere)", "has no heading #nowhere"),
        ("[a]\n\n[a]: docs/none.md", "there is no docs/none.md"),
        ("![picture](docs/none.svg)", "there is no docs/none.svg"),
        ("[a](../outside)", "there is no ../outside"),
        ("say `make tset`", "no target tset"),
        ("```sh\n$ make help tset   # both\n```", "no target tset"),
        ("`hydro studdy run`", "no command studdy"),
        ("`hydro study ran FILE`", "no command ran"),
        ("`hydro study run|stop FILE`", "no command stop"),
        ("`hydro study run --step 3 FILE`", "no option --step"),
        ("```\n.venv/bin/hydro doctr\n```", "no command doctr"),
        ("see " + "/wo" + "rk/main", "path of one machine"),
        ("see " + "/ro" + "ot", "path of one machine"),
    ],
)
def test_offence_is_found(tmp_path: Path, text: str, fragment: str) -> None:
    offences = check_docs.check(make_tree(tmp_path, text), make_parser())
    assert len(offences) == 1
    assert fragment in offences[0]


@pytest.mark.parametrize(
    "text",
    [
        "[a](docs/page.md) and [b](docs/page.md#what-it-is-for) and [c](docs/page.md#what-it-is-for-1)",
        "[out](https://example.org/none) and [mail](mailto:a@example.org)",
        "`[a](docs/none.md)`",
        "```\n[a](docs/none.md)\n```",
        "`make test PYTEST_ARGS=-x` and `make help`; make sense of it",
        "`hydro study run --steps=3 FILE` and `hydro study` and `hydro doctor` and `hydro …`",
        "`hydro study submit FILE --partition=gpu`",
        "`hydro GROUP COMMAND`",
        "a/work/b and /workload and ~/work/x and $HOME/root",
    ],
)
def test_sound_page_passes(tmp_path: Path, text: str) -> None:
    assert check_docs.check(make_tree(tmp_path, text), make_parser()) == []


RECORD = '''
@dataclass(frozen=True)
class Point:
    """A point."""

    FORMAT: ClassVar[str] = "hydro.point"
    VERSION: ClassVar[int] = 2

    x: float
    """Metres
    to the right."""
    names: Optional[tuple[str, ...]] = None
'''
PAGE = "Points:\n\n<!-- record Point -->\nold\n<!-- end -->\n\nThe end.\n"


LAYOUT = """
RECORD_OFFSET = 136
FIELDS = (Field("a", "uint32_t", "first"), Field("b", "int32_t", "second"), Field("c", "int64_t", "third"))
"""


def renewed(page: str, source: str) -> str:
    return format_tables.renewed(page, format_tables.records_in([source]), ast.parse(LAYOUT))


def test_table_holds_every_field_with_its_meaning() -> None:
    assert renewed(PAGE, RECORD) == (
        "Points:\n\n<!-- record Point -->\n"
        '`"format": "hydro.point", "version": 2`\n\n'
        "| field | type | default | meaning |\n| --- | --- | --- | --- |\n"
        "| `x` | `number` |  | Metres to the right. |\n"
        "| `names` | `list of string or null` | `null` |  |\n"
        "<!-- end -->\n\nThe end.\n"
    )


def test_table_of_a_shared_page_counts_offsets() -> None:
    table = renewed("<!-- page FIELDS -->\n<!-- end -->", "").splitlines()
    assert table[3:6] == [
        "| 136 | `a` | `uint32_t` | first |",
        "| 140 | `b` | `int32_t` | second |",
        "| 144 | `c` | `int64_t` | third |",
    ]


def test_record_without_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="records without a table: \\['Point'\\]"):
        renewed("nothing", RECORD)


def test_record_that_is_nested_in_another_needs_its_table_too() -> None:
    source = RECORD + "    inner: tuple[Inner, ...] = ()\n\n@dataclass\nclass Inner:\n    y: int\n"
    with pytest.raises(ValueError, match="records without a table: \\['Inner'\\]"):
        renewed(PAGE, source)


def test_table_without_a_record_is_refused() -> None:
    with pytest.raises(ValueError, match="tables without a record: \\['Point'\\]"):
        renewed(PAGE, "")
