"""Renew the tables of docs/formats.md from the records in hydro_slurm/model.py, or check that they are new.

Usage: `python tools/format_tables.py [--check]`. A table stands between `<!-- record NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

_MARKED = re.compile(r"(<!-- record (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table_of(record: ast.ClassDef) -> str:
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


def _default(value: ast.expr) -> str:
    """As it stands in JSON."""
    text = ast.unparse(value)
    known = {"None": "null", "True": "true", "False": "false", "()": "[]", "field(default_factory=dict)": "{}"}
    if text in known:
        return known[text]
    return text.replace("'", '"')


def _type_name(annotation: ast.expr) -> str:
    """The type in words of JSON, with the record's name where a record is nested."""
    if isinstance(annotation, ast.Subscript):
        outer, inner = ast.unparse(annotation.value), annotation.slice
        if outer == "Optional":
            return f"{_type_name(inner)} or null"
        arguments = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        if outer == "tuple":
            return f"list of {_type_name(arguments[0])}"
        if outer == "dict":
            return f"object of {_type_name(arguments[1])}"
    name = ast.unparse(annotation)
    return {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "Any": "any"}.get(name, name)


def renewed(text: str, model_source: str) -> str:
    """The page with new tables.

    Raises:
        ValueError: The page has no table of a record that is written to files, or one of a record that does not exist.
    """
    classes = {node.name: node for node in ast.parse(model_source).body if isinstance(node, ast.ClassDef)}
    present = {match[1] for match in _MARKED.findall(text)}
    missing = [name for name in classes if name not in present]
    unknown = sorted(present - classes.keys())
    if missing or unknown:
        raise ValueError(f"records without a table: {missing}; tables without a record: {unknown}")
    return _MARKED.sub(lambda match: f"{match[1]}{table_of(classes[match[2]])}{match[3]}", text)


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    page = root / "docs" / "formats.md"
    old = page.read_text()
    try:
        new = renewed(old, (root / "hydro_slurm" / "model.py").read_text())
    except ValueError as error:
        print(f"docs/formats.md: {error}; give each record `<!-- record NAME -->` and `<!-- end -->`")
        return 1
    if old == new:
        return 0
    if "--check" in sys.argv[1:]:
        print("docs/formats.md: its tables are older than hydro_slurm/model.py; run: make format")
        return 1
    page.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
