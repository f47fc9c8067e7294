"""What a source file contains that Python 3.9 cannot run, as far as its syntax tree shows.

A net, not a proof: where a Python 3.9 is installed, a test imports the modules with it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

_NEWER_NAMES = {
    "contextlib": {"aclosing", "chdir"},
    "dataclasses": {"KW_ONLY"},
    "datetime": {"UTC"},
    "enum": {"EnumCheck", "ReprEnum", "StrEnum", "member", "nonmember", "verify"},
    "inspect": {"get_annotations", "getmembers_static"},
    "itertools": {"batched", "pairwise"},
    "types": {"EllipsisType", "NoneType", "NotImplementedType", "UnionType"},
    "typing": {
        *("Concatenate", "LiteralString", "Never", "NotRequired", "ParamSpec", "Required", "Self", "TypeAlias"),
        *("TypeGuard", "TypeVarTuple", "Unpack", "assert_never", "assert_type", "override", "reveal_type"),
    },
}
"""Names that came to a module of the standard library after 3.9."""

_NEWER_MODULES = {"tomllib"}
_NEWER_ARGUMENTS = {
    "dataclass": {"kw_only", "match_args", "slots", "weakref_slot"},
    "field": {"kw_only"},
    "zip": {"strict"},
}
_NEWER_BUILTINS = {"BaseExceptionGroup", "ExceptionGroup", "EncodingWarning", "aiter", "anext"}
_NEWER_METHODS = {"add_note", "bit_count", "hardlink_to"}


def python39_offences(source: str) -> Iterator[tuple[int, str]]:
    """Line numbers and what stands there."""
    try:
        tree = ast.parse(source, feature_version=(3, 9))
    except SyntaxError as error:
        yield error.lineno or 1, f"syntax: {error.msg}"
        return
    annotations = list(_annotations(tree))
    if annotations and not _postpones_annotations(tree):
        yield 1, "from __future__ import annotations is missing"
    inside_annotations = {id(node) for annotation in annotations for node in ast.walk(annotation)}

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in _NEWER_MODULES:
                    yield node.lineno, f"module {alias.name}"
        elif isinstance(node, ast.ImportFrom) and not node.level:
            if node.module in _NEWER_MODULES:
                yield node.lineno, f"module {node.module}"
            for alias in node.names:
                if alias.name in _NEWER_NAMES.get(node.module or "", ()):
                    yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.attr in _NEWER_NAMES.get(node.value.id, ()):
                yield node.lineno, f"{node.value.id}.{node.attr}"
            elif node.attr in _NEWER_METHODS:
                yield node.lineno, f"method {node.attr}"
        elif isinstance(node, ast.Name) and node.id in _NEWER_BUILTINS:
            yield node.lineno, node.id
        elif isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            for keyword in node.keywords:
                if keyword.arg in _NEWER_ARGUMENTS.get(function, ()):
                    yield node.lineno, f"{function}({keyword.arg}=…)"
        elif _is_union_of_types(node) and id(node) not in inside_annotations:
            yield node.lineno, f"{ast.unparse(node)} is evaluated at run time"  # type: ignore[attr-defined]

    yield from _record_offences(tree)


def _record_offences(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Records are decoded by typing.get_type_hints, which evaluates the annotations of their fields."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    fields = [item for node in classes for item in node.body if isinstance(item, ast.AnnAssign)]
    if not any(isinstance(item.target, ast.Name) and item.target.id == "FORMAT" for item in fields):
        return
    for item in fields:
        if any(map(_is_union_of_types, ast.walk(item.annotation))):
            yield (
                item.lineno,
                f"a record's fields are decoded by their types: Optional, not {ast.unparse(item.annotation)}",
            )


def _postpones_annotations(tree: ast.Module) -> bool:
    return any(
        isinstance(node, ast.ImportFrom)
        and node.module == "__future__"
        and any(alias.name == "annotations" for alias in node.names)
        for node in tree.body
    )


def _annotations(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.returns:
            yield node.returns
        elif isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation:
            yield node.annotation


_TYPES = {"bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "set", "str", "tuple"}


def _is_union_of_types(node: ast.AST) -> bool:
    """`X | Y` where one side is None, a built-in type, or such a union."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.BitOr):
        return False
    for side in (node.left, node.right):
        base = side.value if isinstance(side, ast.Subscript) else side
        if isinstance(base, ast.Constant) and base.value is None:
            return True
        if isinstance(base, ast.Name) and base.id in _TYPES:
            return True
        if _is_union_of_types(side):
            return True
    return False
