"""Reading and writing the JSON files that parts of the system leave for each other.

A file is one JSON object with `format` and `version` beside the fields of a dataclass of `model`. Files come from
other processes, and in part from other users: sizes are bounded, types are checked, unknown fields are ignored (a
newer writer may add some), and a reader says what it got and what it wanted. Standard library only, Python 3.9.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import tempfile
import typing
from pathlib import Path
from typing import Any, TypeVar, Union

from hydro_slurm.errors import FormatError

MAX_FILE_BYTES = 4 << 20
"""Largest file that is parsed; anything larger is refused unread."""

T = TypeVar("T")


def to_document(record: Any) -> dict[str, Any]:
    """The JSON object of a dataclass instance, headed by its class's FORMAT and VERSION."""
    return {"format": record.FORMAT, "version": record.VERSION, **dataclasses.asdict(record)}


def from_document(kind: type[T], document: Any, origin: str) -> T:
    """The dataclass instance that a JSON object describes.

    Args:
        kind: A dataclass with class attributes FORMAT and VERSION.
        document: What was parsed.
        origin: Where it was found, for the message.

    Raises:
        FormatError: Another format, another version, a missing field or a field of the wrong type.
    """
    wanted_format, wanted_version = kind.FORMAT, kind.VERSION  # type: ignore[attr-defined]
    if not isinstance(document, dict):
        raise FormatError(f"{origin}: got {type(document).__name__}, needed a JSON object of {wanted_format}")
    found = (document.get("format"), document.get("version"))
    if found != (wanted_format, wanted_version):
        raise FormatError(
            f"{origin}: got format {found[0]!r} version {found[1]!r}, needed {wanted_format!r} version "
            f"{wanted_version}; use the hydro_slurm that wrote it, or remove the file"
        )
    return _decode_dataclass(kind, document, origin)


def read_record(kind: type[T], path: Path) -> T:
    """Read one file as `kind`.

    Raises:
        FormatError: The file is too large, is not JSON, or is not a `kind`.
        OSError: The file cannot be read (FileNotFoundError included).
    """
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise FormatError(f"{path}: got more than {MAX_FILE_BYTES} bytes, needed a small JSON file")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not JSON ({error}); was it cut off while being copied?") from None
    return from_document(kind, document, str(path))


def write_record(path: Path, record: Any, *, mode: int = 0o644) -> None:
    """Write a dataclass instance so that a reader sees the old file or the new one, never a part.

    The directory must exist. Not-a-number and infinite values become null.
    """
    write_text_atomic(path, json.dumps(_finite(to_document(record)), indent=1, allow_nan=False) + "\n", mode=mode)


def write_text_atomic(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write a temporary file beside `path`, then rename it over `path`."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _decode_dataclass(kind: type[T], document: dict[str, Any], origin: str) -> T:
    hints = typing.get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in document:
            values[field.name] = _decode(hints[field.name], document[field.name], f"{origin}: {field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise FormatError(f"{origin}: field {field.name!r} is missing from this {kind.__name__}")
    return kind(**values)


def _decode(hint: Any, value: Any, origin: str) -> Any:
    target = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if hint is Any:
        return value
    if target is Union:
        if value is None and type(None) in arguments:
            return None
        return _decode(next(a for a in arguments if a is not type(None)), value, origin)
    if target is typing.Literal:
        if value not in arguments:
            raise FormatError(f"{origin}: got {value!r}, needed one of {', '.join(map(repr, arguments))}")
        return value
    if target in (list, tuple):
        if not isinstance(value, list):
            raise FormatError(f"{origin}: got {type(value).__name__}, needed a list")
        return target(_decode(arguments[0], item, f"{origin}[{i}]") for i, item in enumerate(value))
    if target is dict:
        if not isinstance(value, dict):
            raise FormatError(f"{origin}: got {type(value).__name__}, needed an object")
        return {key: _decode(arguments[1], item, f"{origin}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise FormatError(f"{origin}: got {type(value).__name__}, needed an object")
        return _decode_dataclass(typing.cast("type[Any]", hint), value, origin)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise FormatError(f"{origin}: got {type(value).__name__}, needed {hint.__name__}")
    return value
