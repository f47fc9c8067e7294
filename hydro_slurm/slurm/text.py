"""Reading what Slurm commands print.

Names and comments come from other users and may hold any byte, so fields end with a word that nobody can guess and
the free text is never searched for anything else.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from datetime import datetime

from hydro_slurm.errors import FormatError, SlurmError

_NO_TIME = frozenset({"", "N/A", "NONE", "UNKNOWN", "(NULL)", "INVALID"})
_UNLIMITED = frozenset({"UNLIMITED", "INFINITE", "NOT_SET", "PARTITION_LIMIT", "INVALID", "N/A", "(NULL)", ""})
_NULL = "(null)"


class Layout:
    """An output format of `squeue` or `sinfo` for these fields (`%i`), unguessable to the authors of their content."""

    def __init__(self, fields: Sequence[str]) -> None:
        word = secrets.token_hex(8)
        self._fields = len(fields)
        self._end_field, self._end_record = f"~{word}f~", f"~{word}r~"
        self.text = self._end_field.join(fields) + self._end_record

    def records(self, output: str) -> list[list[str]]:
        """The fields of every record.

        Raises:
            SlurmError: The output does not have this layout.
        """
        found = []
        pieces = output.split(self._end_record)
        for piece in pieces[:-1]:
            fields = piece.removeprefix("\n").split(self._end_field)
            if len(fields) != self._fields:
                raise SlurmError(f"a Slurm command printed {len(fields)} fields where {self._fields} were asked for")
            found.append(fields)
        if pieces[-1].strip():
            raise SlurmError(f"a Slurm command printed something unexpected: {pieces[-1].strip()[:200]!r}")
        return found


def parse_time(text: str) -> float | None:
    """Seconds since the epoch of what `SLURM_TIME_FORMAT=%s` or the standard format prints; null for no time.

    Raises:
        FormatError: It is no time.
    """
    text = text.strip()
    if text.upper() in _NO_TIME:
        return None
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise FormatError(f"not a time of Slurm's: {text[:80]!r}") from None


def parse_duration(text: str) -> float | None:
    """Seconds of `30`, `30:00`, `1:00:00`, `2-12`, `2-12:30:00` (minutes first, as Slurm has it); null for unlimited.

    Raises:
        FormatError: It is no duration.
    """
    text = text.strip()
    if text.upper() in _UNLIMITED:
        return None
    days, hours, minutes, seconds = _duration_parts(text)
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _duration_parts(text: str) -> tuple[int, int, int, int]:
    day_text, dash, rest = text.partition("-") if "-" in text else ("0", "", text)
    numbers = rest.split(":")
    if (
        not all(part.isascii() and part.isdigit() and len(part) <= 9 for part in (day_text, *numbers))
        or len(numbers) > 3
    ):
        raise FormatError(f"not a duration of Slurm's: {text[:80]!r}")
    values = [int(number) for number in numbers]
    if dash:  # days-hours[:minutes[:seconds]]
        values += [0] * (3 - len(values))
    elif len(values) < 3:  # minutes[:seconds]
        values = [0, *values, *[0] * (2 - len(values))]
    return int(day_text), values[0], values[1], values[2]


def format_duration(seconds: float) -> str:
    """A time limit as sbatch takes it, in whole seconds, at least one."""
    total = max(1, round(seconds))
    hours, rest = divmod(total, 3600)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02d}:{rest // 60:02d}:{rest % 60:02d}"


def parse_exit_code(text: str) -> int | None:
    """An exit status, or 128 plus a signal's number, of the wait status `768` or of `3:0`; null if it is neither."""
    text = text.strip()
    status, colon, number = text.partition(":")
    if not all(part.isascii() and part.isdigit() for part in (status, number or "0")):
        return None
    if colon:
        return 128 + int(number) if int(number) else int(status)
    value = int(status)
    return 128 + (value & 0x7F) if value & 0x7F else value >> 8


def null_to_empty(text: str) -> str:
    """Free text as it was given; Slurm prints a missing one as `(null)`."""
    return "" if text == _NULL else text


def integers(texts: Iterable[str]) -> list[int]:
    """Numbers that Slurm printed.

    Raises:
        SlurmError: One is no number.
    """
    try:
        return [int(text) for text in texts]
    except ValueError as error:
        raise SlurmError(f"a Slurm command printed no number where one was needed: {error}") from None
