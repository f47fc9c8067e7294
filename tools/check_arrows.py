"""Check who imports whom, what is imported at import time, and what must run on Python 3.9.

Reads the sources with `ast` and imports none of them. Usage: `python tools/check_arrows.py [ROOT]`; prints one line
for each offence and exits 1 if there is any.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from python39 import python39_offences

PACKAGES = {"hydro_slurm": "hydro_slurm", "hydro_trials": "trials/hydro_trials", "hydro_sim": "sim/hydro_sim"}
"""Import packages and the folders that they lie in."""

_BASE = {"model", "formats", "clock", "errors", "timeline"}
_CONTROL = _BASE | {"config", "log", "examples"}
_RECONCILE = _CONTROL | {"slurm", "policy"}

ARROWS: dict[str, set[str]] = {
    "model": {"errors"},
    "errors": set(),
    "clock": set(),
    "log": {"errors"},
    "formats": {"errors", "model"},
    "timeline": {"model", "formats", "clock", "errors"},
    "config": {"model", "formats", "errors"},
    "examples": {"errors"},
    "gate": _BASE - {"timeline"},
    "hooks": _BASE | {"gate", "slurm"},
    "testbed": _BASE | {"gate", "slurm"},
    "slurm": _CONTROL,
    "policy": _CONTROL,
    "daemon": _RECONCILE,
    "study": _RECONCILE | {"daemon"},
    "demo": _CONTROL | {"slurm", "study", "testbed"},
    "cli": _RECONCILE | {"daemon", "study", "demo", "testbed"},
}
"""For each part of hydro_slurm, the other parts that it may import."""

FOREIGN_ARROWS: dict[str, set[str]] = {
    "hydro_trials": _BASE | {"gate", "log"},
    "hydro_sim": {"policy", "model", "formats", "config", "clock", "errors", "timeline"},
}
"""For the two other packages, the parts of hydro_slurm that they may import. They never import each other."""

HOST_PARTS = {"gate", "hooks", "model", "formats", "errors", "clock", "timeline"}
"""What is installed into the host's environment: standard library only, Python 3.9."""

LAZY_HOST_MODULES = {"torch", "deepspeed"}
"""What hooks may import inside functions: the host's own framework."""

DEPENDENCIES = {"numpy", "optuna", "psutil"}
"""What hydro_slurm may import at import time beside the standard library (its dependencies in pyproject.toml)."""


@dataclass(frozen=True)
class Import:
    module: str
    """Full dotted name; `from a import b` counts as a.b where that is a module of ours, else as a."""
    line: int
    at_import_time: bool


def modules_of(root: Path) -> dict[str, Path]:
    """Dotted name of every module of the three packages, with its file."""
    found = {}
    for package, folder in PACKAGES.items():
        base = root / folder
        for path in sorted(base.rglob("*.py")):
            parts = [package, *path.relative_to(base).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join(parts)] = path
    return found


def imports_of(module: str, path: Path, tree: ast.AST, known: dict[str, Path]) -> Iterator[Import]:
    """Every import statement of a module, those for type checkers alone (`if TYPE_CHECKING`) left out."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, at_import_time: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for statement in node.orelse:
                yield from visit(statement, at_import_time)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_import_time)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield Import(name if name in known else base, node.lineno, at_import_time)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_import_time and not inside)

    yield from visit(tree, True)


def _part(module: str) -> str:
    """`gate` for hydro_slurm.gate.page; empty for the package itself."""
    return [*module.split("."), ""][1]


def arrow_offence(module: str, found: Import) -> str | None:
    """Why this module may not have this import, or None."""
    package, target = module.split(".")[0], found.module.split(".")[0]
    if target in PACKAGES:
        if target == package:
            return _own_arrow_offence(module, found.module) if package == "hydro_slurm" else None
        if target != "hydro_slurm":
            return f"{package} never imports {target}"
        part = _part(found.module)
        if part and part not in FOREIGN_ARROWS[package]:
            return f"{package} may import hydro_slurm.{{{', '.join(sorted(FOREIGN_ARROWS[package]))}}}, not {part}"
        return None
    if package != "hydro_slurm" or target in sys.stdlib_module_names:
        return None
    if _part(module) in HOST_PARTS:
        if found.at_import_time or _part(module) != "hooks" or target not in LAZY_HOST_MODULES:
            return f"{target} is not in the standard library, and this runs in the host's environment"
    elif found.at_import_time and target not in DEPENDENCIES:
        return f"hydro_slurm imports at import time only the standard library and {', '.join(sorted(DEPENDENCIES))}"
    return None


def _own_arrow_offence(module: str, imported: str) -> str | None:
    source, target = _part(module), _part(imported)
    if source in ("", target) or target == "":
        return None if source or target in {"", "errors"} else "the package itself imports nothing of its parts"
    if source not in ARROWS:
        return f"{source} is a new part: give it its arrows in tools/check_arrows.py"
    if target not in ARROWS[source]:
        allowed = ", ".join(sorted(ARROWS[source])) or "no other part"
        return f"{source} may import {allowed}, not {target}"
    return None


def host_modules(imports: dict[str, list[Import]]) -> set[str]:
    """The modules that run in the host's environment: the parts named, and all of ours that they import."""
    reached: set[str] = set()
    pending = [name for name in imports if name.startswith("hydro_slurm") and _part(name) in HOST_PARTS]
    while pending:
        name = pending.pop()
        if name in reached or name not in imports:
            continue
        reached.add(name)
        pending += [found.module for found in imports[name]]
        pending += [name.rpartition(".")[0]]  # importing a module runs its packages first
    return reached


def check(root: Path) -> list[str]:
    """All offences, as `file:line: message`."""
    known = modules_of(root)
    if not known:
        return [f"{root}: holds none of {', '.join(PACKAGES.values())}"]
    trees = {name: ast.parse(path.read_bytes(), str(path)) for name, path in known.items()}
    imports = {name: list(imports_of(name, known[name], tree, known)) for name, tree in trees.items()}

    offences = []
    for name, path in known.items():
        for found in imports[name]:
            message = arrow_offence(name, found)
            if message:
                offences.append(f"{path.relative_to(root)}:{found.line}: imports {found.module}: {message}")
    for name in sorted(host_modules(imports)):
        path = known[name]
        for line, message in python39_offences(path.read_text()):
            offences.append(f"{path.relative_to(root)}:{line}: does not run on Python 3.9: {message}")
    return offences


def main() -> int:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
    offences = check(root)
    for offence in offences:
        print(offence)
    print(f"check_arrows: {len(offences)} offences in {len(modules_of(root))} modules")
    return 1 if offences else 0


if __name__ == "__main__":
    raise SystemExit(main())
