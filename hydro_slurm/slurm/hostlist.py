"""Slurm's notation for sets of nodes: `gpu[01-16,20],login1`, `r[1-2]n[01-08]`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from hydro_slurm.errors import FormatError

MAX_HOSTS = 65536
"""Most names that one expression may stand for (Slurm's own MAX_RANGE is 64 Ki)."""
MAX_TEXT = 1 << 20

_PIECE = re.compile(r"([^\[\],\s]+)|\[([^\[\]\s]*)\]|(,)")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")
_NUMBERED = re.compile(r"(.*?)([0-9]{1,18})", re.DOTALL)
_PLAIN = re.compile(r"[^\[\],\s]+")


def expand(text: str) -> tuple[str, ...]:
    """All names of a hostlist expression, in its order, each once.

    Raises:
        FormatError: It is no hostlist expression, or stands for more than MAX_HOSTS names.
    """
    if len(text) > MAX_TEXT:
        raise FormatError(f"hostlist of {len(text)} bytes; needed at most {MAX_TEXT}")
    found: dict[str, None] = {}
    for words in _split(text):
        names = [""]
        for choices in words:
            if len(names) * len(choices) + len(found) > MAX_HOSTS:
                raise FormatError(f"hostlist {_short(text)} stands for more than {MAX_HOSTS} names")
            names = [name + choice for name in names for choice in choices]
        found.update(dict.fromkeys(names))
    return tuple(found)


def compress(names: Iterable[str]) -> str:
    """The hostlist expression of these names, sorted by prefix and number, each once.

    Numbers at the end become ranges; numbers of different widths (`1`, `01`) stay apart.

    Raises:
        FormatError: A name contains a comma, bracket or white space, or is empty.
    """
    plain: list[str] = []
    numbered: dict[tuple[str, int], list[int]] = {}
    for name in sorted(set(names)):
        if not _PLAIN.fullmatch(name):
            raise FormatError(f"not the name of a node: {_short(name)}")
        match = _NUMBERED.fullmatch(name)
        if match is None or not match[2].isascii():
            plain.append(name)
            continue
        digits = match[2]
        # Slurm's own rule: a leading zero fixes the width, so `n09` and `n10` are one range and `n9` is another's.
        numbered.setdefault((match[1], len(digits)), []).append(int(digits))
    parts = {name: name for name in plain}
    for (prefix, width), numbers in _merged(numbered).items():
        spans = ",".join(_span(first, last, width) for first, last in _runs(sorted(numbers)))
        single = len(numbers) == 1
        parts[f"{prefix}{min(numbers):0{width}d}"] = f"{prefix}{spans}" if single else f"{prefix}[{spans}]"
    return ",".join(parts[key] for key in sorted(parts))


def _merged(numbered: dict[tuple[str, int], list[int]]) -> dict[tuple[str, int], list[int]]:
    """Join widths where no number is padded: `n9` and `n10` share the range `n[9-10]`."""
    merged: dict[tuple[str, int], list[int]] = {}
    for (prefix, width), numbers in sorted(numbered.items()):
        padded = [number for number in numbers if width > 1 and number < 10 ** (width - 1)]
        if padded:
            merged.setdefault((prefix, width), []).extend(numbers)
        else:
            merged.setdefault((prefix, 1), []).extend(numbers)
    return merged


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    first = last = numbers[0]
    for number in numbers[1:]:
        if number != last + 1:
            yield first, last
            first = number
        last = number
    yield first, last


def _span(first: int, last: int, width: int) -> str:
    return f"{first:0{width}d}" if first == last else f"{first:0{width}d}-{last:0{width}d}"


def _split(text: str) -> Iterator[list[list[str]]]:
    """The comma-separated words of an expression, each a list of pieces, each a list of choices."""
    word: list[list[str]] = []
    position = 0
    text = text.strip()
    while position < len(text):
        match = _PIECE.match(text, position)
        if match is None:
            raise FormatError(f"not a hostlist: {_short(text)} (at character {position + 1})")
        position = match.end()
        if match[3]:
            if not word or position == len(text):
                raise FormatError(f"not a hostlist: {_short(text)} (an empty name at character {position})")
            yield word
            word = []
        else:
            word.append([match[1]] if match[1] else _choices(match[2], text))
    if word:
        yield word


def _choices(inner: str, text: str) -> list[str]:
    choices: list[str] = []
    for part in inner.split(","):
        match = _RANGE.fullmatch(part)
        if match is None or not part.isascii():
            raise FormatError(f"not a hostlist: {_short(text)} ({part!r} is no number and no range)")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first + len(choices) >= MAX_HOSTS:
            raise FormatError(f"not a hostlist: {_short(text)} (range {part} is reversed, or over {MAX_HOSTS} names)")
        width = len(match[1])
        choices.extend(f"{number:0{width}d}" for number in range(first, last + 1))
    return choices


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
