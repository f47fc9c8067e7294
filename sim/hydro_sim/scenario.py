"""Scenario files: TOML into frozen, validated settings, and variants of them."""

from __future__ import annotations

import copy
import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from hydro_sim.settings import Scenario
from hydro_slurm.errors import ConfigError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class ScenarioFile:
    """A scenario as it was written, so that variants can be made of it."""

    path: Path
    document: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where relative paths start."""
        return self.path.parent

    def scenario(self, changes: Mapping[str, object] | None = None) -> Scenario:
        """The scenario, with some settings changed.

        Args:
            changes: Values by dotted name; `hosts.0.devices` or `hosts.*.devices` reach into lists.
        """
        document = copy.deepcopy(self.document)
        for name, value in (changes or {}).items():
            _set(document, name.split("."), value, name)
        return decode(Scenario, document, str(self.path))


def read_scenario(path: Path) -> ScenarioFile:
    """Read a scenario.

    Raises:
        ConfigError: It cannot be read, is not TOML, or says what is no setting.
    """
    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the scenario {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    found = ScenarioFile(path, document)
    found.scenario()
    return found


def decode(kind: type[T], document: Any, origin: str) -> T:
    """Make a dataclass of a TOML table; an unknown key is an error that lists the known ones."""
    if not isinstance(document, dict):
        raise ConfigError(f"{origin}: got {document!r}, needed a table")
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in document:
        if name not in known:
            raise ConfigError(f"{origin}: there is no setting {name!r}; known: {', '.join(known)}")
    values = {name: _decode(hints[name], value, f"{origin}: {name}") for name, value in document.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{origin}: {str(error).replace(f'{kind.__name__}.__init__()', kind.__name__)}") from None
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None


def _decode(hint: Any, value: Any, origin: str) -> Any:
    target, arguments = typing.get_origin(hint), typing.get_args(hint)
    if target in (types.UnionType, typing.Union):
        return _decode(next(a for a in arguments if a is not type(None)), value, origin)
    if target is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{origin}: got {value!r}, needed a list")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_decode(arguments[0], item, f"{origin}[{i}]") for i, item in enumerate(value))
        if len(arguments) != len(value):
            raise ConfigError(f"{origin}: got {value!r}, needed {len(arguments)} values")
        return tuple(
            _decode(a, item, f"{origin}[{i}]") for i, (a, item) in enumerate(zip(arguments, value, strict=True))
        )
    if target is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{origin}: got {value!r}, needed a table")
        return {name: _decode(arguments[1], item, f"{origin}.{name}") for name, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return decode(typing.cast("type[Any]", hint), value, origin)
    if hint is object:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{origin}: got {value!r}, needed {hint.__name__}")
    return value


def _set(document: Any, path: list[str], value: object, name: str) -> None:
    head, *rest = path
    if isinstance(document, list):
        if head != "*" and not (head.isdigit() and int(head) < len(document)):
            raise ConfigError(f"{name}: {head!r} is no place in a list of {len(document)}; use a number or *")
        for index in range(len(document)) if head == "*" else [int(head)]:
            if rest:
                _set(document[index], rest, value, name)
            else:
                document[index] = value
        return
    if not isinstance(document, dict):
        raise ConfigError(f"{name}: there is nothing below {head!r}")
    if rest:
        _set(document.setdefault(head, {}), rest, value, name)
    else:
        document[head] = value
