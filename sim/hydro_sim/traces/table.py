"""What every trace becomes: columns of jobs, and an account of the rows that were left out."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from hydro_slurm.errors import TraceError

MAX_SHOWN = 5
"""Malformed lines that a message quotes; the account has all of them."""

MAX_BAD_SHARE = 0.2
"""A file with more malformed rows than this is another format."""


@dataclass(frozen=True, slots=True)
class TraceJob:
    """One job of a trace; times in seconds, `submit_s` since the epoch."""

    submit_s: float
    duration_s: float
    num_devices: int
    user: str = ""
    partition: str = ""
    name: str = ""
    limit_s: float | None = None
    waited_s: float | None = None
    """Queueing delay that the trace itself records."""
    comment: str = ""


@dataclass(slots=True)
class Trace:
    """Jobs in the order of their submit times."""

    origin: str
    """File name, or what generated it."""
    synthetic: bool
    jobs: list[TraceJob]
    bad_rows: list[tuple[int, str]] = field(default_factory=list)
    """(line, why) of each row that was left out because it is malformed."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows that are well formed but no jobs for the simulator, by reason."""
    warnings: list[str] = field(default_factory=list)
    """What is plausible only if somebody says so."""

    @property
    def span_s(self) -> float:
        """From the first to the last submit time."""
        return self.jobs[-1].submit_s - self.jobs[0].submit_s if self.jobs else 0.0

    def describe(self) -> list[str]:
        """The account of a trace, as lines of text."""
        days = self.span_s / 86400
        device_h = sum(job.duration_s * job.num_devices for job in self.jobs) / 3600
        lines = [
            f"{self.origin}: {len(self.jobs)} jobs over {days:.1f} days, {device_h:,.0f} device hours"
            + (" (synthetic)" if self.synthetic else "")
        ]
        lines += [f"left out: {count} rows: {reason}" for reason, count in sorted(self.left_out.items())]
        if self.bad_rows:
            lines.append(f"malformed: {len(self.bad_rows)} rows")
            lines += [f"  line {line}: {why}" for line, why in self.bad_rows[:MAX_SHOWN]]
            if len(self.bad_rows) > MAX_SHOWN:
                lines.append(f"  and {len(self.bad_rows) - MAX_SHOWN} more")
        return lines + [f"warning: {text}" for text in self.warnings]


class RowError(ValueError):
    """A row that is malformed; the message says why."""


class SkipRow(Exception):  # noqa: N818  # a well-formed row, not an error
    """A row that is no job for the simulator; the message says why."""


def read_table(
    path: Path,
    columns: Sequence[str],
    parse: Callable[[Mapping[str, str]], TraceJob],
    *,
    delimiter: str = ",",
    optional: Sequence[str] = (),
) -> Trace:
    """Read a table with a header line; rows that `parse` refuses are kept as an account.

    Args:
        path: The file.
        columns: Columns that must be there.
        parse: Makes a job of a row, or raises RowError or SkipRow.
        delimiter: What separates the fields.
        optional: Columns that may be missing.

    Raises:
        TraceError: The file cannot be read, lacks columns, holds no job, or is malformed in more than a fifth of its
            rows.
    """
    trace = Trace(path.name, False, [])
    num_rows = 0
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            # sacct quotes nothing: to it, a name that begins with a quotation mark is a name
            unquoted = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
            rows = unquoted if delimiter == "|" else csv.reader(file, delimiter=delimiter)
            for line, row in _rows(rows, path, columns, optional):
                num_rows += 1
                try:
                    if row is None:
                        raise RowError("another number of fields than the header has")
                    trace.jobs.append(parse(row))
                except RowError as error:
                    trace.bad_rows.append((line, str(error)))
                except SkipRow as reason:
                    trace.left_out[str(reason)] += 1
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror}") from None
    except csv.Error as error:
        raise TraceError(f"{path}: not a table: {error}") from None
    if not trace.jobs or len(trace.bad_rows) > MAX_BAD_SHARE * num_rows:
        shown = "; ".join(f"line {line}: {why}" for line, why in trace.bad_rows[:MAX_SHOWN]) or "no rows"
        raise TraceError(
            f"{path}: {len(trace.bad_rows)} of {num_rows} rows are malformed and {len(trace.jobs)} are jobs; "
            f"is it the format that was named? {shown}"
        )
    trace.jobs.sort(key=lambda job: job.submit_s)
    return trace


def _rows(
    reader: Any, path: Path, columns: Sequence[str], optional: Sequence[str]
) -> Iterator[tuple[int, dict[str, str] | None]]:
    header = [name.strip() for name in next(reader, [])]
    missing = [name for name in columns if name not in header]
    if missing:
        raise TraceError(
            f"{path}: the header lacks {', '.join(missing)}; got {', '.join(header[:20]) or 'an empty file'}; needed "
            f"{', '.join(columns)}"
        )
    for row in reader:
        if not row:
            continue
        if len(row) != len(header):
            # sacct ends each line with a delimiter under --parsable, not under --parsable2.
            yield reader.line_num, None
            continue
        yield reader.line_num, {name: value.strip() for name, value in zip(header, row, strict=True)}


def number(row: Mapping[str, str], name: str, *, least: float | None = None, most: float = math.inf) -> float:
    """A finite number within bounds."""
    text = row[name]
    try:
        value = float(text)
    except ValueError:
        raise RowError(f"{name}: got {text!r}, needed a number") from None
    if not math.isfinite(value) or value > most or (least is not None and value < least):
        raise RowError(f"{name}: got {text}, needed a number from {least} to {most:g}")
    return value


def whole(row: Mapping[str, str], name: str, *, least: int = 0) -> int:
    """A whole number, as 4 or 4.0."""
    value = number(row, name, least=least, most=1e9)
    if value != int(value):
        raise RowError(f"{name}: got {row[name]}, needed a whole number")
    return int(value)


def moment(text: str, zone: tzinfo, name: str = "time") -> float:
    """Seconds since the epoch of a time like 2017-10-09 07:01:55 or 2017-10-09T07:01:55, in a time zone."""
    try:
        value = datetime.fromisoformat(text)
    except ValueError:
        raise RowError(f"{name}: got {text!r}, needed a time like 2026-01-31T12:00:00") from None
    return (value if value.tzinfo else value.replace(tzinfo=zone)).timestamp()


def time_zone(name: str) -> tzinfo:
    """A time zone by its name in the tz database.

    Raises:
        TraceError: There is none.
    """
    if name in ("", "UTC"):
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise TraceError(f"there is no time zone called {name!r}; give one like Europe/Berlin") from None
