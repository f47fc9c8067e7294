"""Renew the tables of docs/formats.md from the records in the sources, or check that they are new.

Usage: `python tools/format_tables.py [--check]`. In the page, `<!-- record NAME -->` … `<!-- end -->` holds the fields
of the dataclass NAME, and `<!-- page NAME -->` … `<!-- end -->` those of a list of Fields in gate/layout.py. Every
dataclass with a FORMAT, and every one nested in such, must have its table.
"""

from __future__ import annotations

import ast
import re
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

_MARKED = re.compile(r"(<!-- (record|page) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

PRIVATE = {"TestbedRecord"}
"""Files that only their writer reads."""

_JSON_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "Any": "any"}
_C_TYPES = {"uint32_t": "I", "int32_t": "i", "uint64_t": "Q", "int64_t": "q"}


def record_table(record: ast.ClassDef) -> str:
    """A Markdown table of a dataclass's fields: name, type, default, and the docstring that follows it."""
    lines = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    constants = {}
    for index, item in enumerate(record.body):
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        if ast.unparse(item.annotation).startswith("ClassVar"):
            constants[item.target.id] = ast.unparse(item.value) if item.value else ""
            continue
        following = record.body[index + 1] if index + 1 < len(record.body) else None
        meaning = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            meaning = " ".join(str(following.value.value).split())
        default = f"`{_default(item.value)}`" if item.value else ""
        lines.append(f"| `{item.target.id}` | `{_type_name(item.annotation)}` | {default} | {meaning} |")
    heading = ""
    if constants:
        heading = f'`"format": {constants["FORMAT"]}, "version": {constants["VERSION"]}`\n\n'.replace("'", '"')
    return heading + "\n".join(lines) + "\n"


def page_table(layout: ast.Module, name: str) -> str:
    """A Markdown table of the fields of a shared-memory page: offset, name, C type, meaning."""
    values = {
        target.id: item.value
        for item in layout.body
        if isinstance(item, ast.Assign)
        for target in item.targets
        if isinstance(target, ast.Name)
    }
    position = ast.literal_eval(values["RECORD_OFFSET"])
    lines = ["| offset | field | type | meaning |", "| --- | --- | --- | --- |"]
    fields = values[name]
    assert isinstance(fields, ast.Tuple)
    for field in fields.elts:
        assert isinstance(field, ast.Call)
        field_name, c_type, meaning = (ast.literal_eval(argument) for argument in field.args)
        lines.append(f"| {position} | `{field_name}` | `{c_type}` | {meaning} |")
        position += struct.calcsize(_C_TYPES[c_type])
    return "\n".join(lines) + "\n"


def _default(value: ast.expr) -> str:
    """As it stands in JSON."""
    text = ast.unparse(value)
    known = {"None": "null", "True": "true", "False": "false", "()": "[]"}
    known |= {"field(default_factory=dict)": "{}", "field(default_factory=list)": "[]"}
    return known.get(text, text.replace("'", '"'))


def _type_name(annotation: ast.expr) -> str:
    """The type in words of JSON, with the record's name where a record is nested."""
    if isinstance(annotation, ast.Subscript):
        outer, inner = ast.unparse(annotation.value), annotation.slice
        arguments = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        if outer == "Optional":
            return f"{_type_name(inner)} or null"
        if outer == "Literal":
            return _JSON_TYPES[type(ast.literal_eval(arguments[0])).__name__]
        if outer in {"tuple", "list"}:
            return f"list of {_type_name(arguments[0])}"
        if outer == "dict":
            return f"object of {_type_name(arguments[1])}"
    name = ast.unparse(annotation)
    return _JSON_TYPES.get(name, name)


def required_names(records: dict[str, ast.ClassDef]) -> list[str]:
    """The records that are written to files, and those nested in them."""

    def has_format(record: ast.ClassDef) -> bool:
        fields = [item for item in record.body if isinstance(item, ast.AnnAssign)]
        return any(isinstance(item.target, ast.Name) and item.target.id == "FORMAT" for item in fields)

    found: list[str] = []
    pending = [name for name, record in records.items() if has_format(record) and name not in PRIVATE]
    while pending:
        name = pending.pop(0)
        if name in found:
            continue
        found.append(name)
        for item in records[name].body:
            if isinstance(item, ast.AnnAssign):
                used = {node.id for node in ast.walk(item.annotation) if isinstance(node, ast.Name)}
                pending += sorted(used & records.keys())
    return found


def records_in(sources: Iterable[str]) -> dict[str, ast.ClassDef]:
    """Every dataclass of some modules, by name."""
    found = {}
    for source in sources:
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
                found[node.name] = node
    return found


def renewed(text: str, records: dict[str, ast.ClassDef], layout: ast.Module | None = None) -> str:
    """The page with new tables.

    Raises:
        ValueError: The page lacks the table of a record that is written to files, or has one of no record.
    """
    present = {match[2] for match in _MARKED.findall(text) if match[1] == "record"}
    missing = [name for name in required_names(records) if name not in present]
    unknown = sorted(present - records.keys())
    if missing or unknown:
        raise ValueError(f"records without a table: {missing}; tables without a record: {unknown}")

    def table(match: re.Match[str]) -> str:
        if match[2] == "record":
            return f"{match[1]}{record_table(records[match[3]])}{match[4]}"
        assert layout is not None
        return f"{match[1]}{page_table(layout, match[3])}{match[4]}"

    return _MARKED.sub(table, text)


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    page = root / "docs" / "formats.md"
    sources = [*sorted((root / "hydro_slurm").rglob("*.py")), *sorted((root / "trials" / "hydro_trials").rglob("*.py"))]
    layout = ast.parse((root / "hydro_slurm" / "gate" / "layout.py").read_text())
    old = page.read_text()
    try:
        new = renewed(old, records_in(path.read_text() for path in sources), layout)
    except ValueError as error:
        print(f"docs/formats.md: {error}; give each record `<!-- record NAME -->` and `<!-- end -->`")
        return 1
    if old == new:
        return 0
    if "--check" in sys.argv[1:]:
        print("docs/formats.md: its tables are older than the sources; run: make format")
        return 1
    page.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
