"""Recorded timelines: what a slot's device did, as JSON lines that hooks and bundles write alike.

The first line is the header (format, version, boot id, wall-clock anchor, node, job, rank), every other line one event.
Times are CLOCK_MONOTONIC nanoseconds, so the timelines of all processes of one node and boot share a time base.
Recording costs one list append; the file grows only in `flush`. Standard library only, Python 3.9.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from hydro_slurm.clock import Clock, SystemClock
from hydro_slurm.errors import FormatError

FORMAT, VERSION = "hydro.timeline", 1

KINDS = frozenset(
    {"forward", "backward", "step", "gap", "open", "close", "quantum", "pause", "resume", "control", "iteration"},
)
"""What an event may be: the host's compute and gaps, the gate's states, a bundle's quanta, whole iterations of the host
(control: one that kept all gates closed)."""

OPTIONAL_FIELDS = ("stage", "iteration", "microbatch", "lanes", "num_steps", "num_quanta")
MAX_LINE_BYTES = 4096
MAX_EVENTS = 4_000_000
"""Most events that a writer records and a reader accepts."""


@dataclass(frozen=True)
class TimelineHeader:
    """Where and on which time base a timeline was recorded."""

    node: str
    job_id: int
    rank: int
    boot_id: str
    anchor_monotonic_ns: int
    """Read at the same moment as `anchor_wall_s`, which gives an event's wall-clock time."""
    anchor_wall_s: float


@dataclass(frozen=True)
class TimelineEvent:
    """One interval (`dur_ns` > 0) or moment (`dur_ns` = 0)."""

    t_ns: int
    dur_ns: int
    kind: str
    stage: Optional[int] = None
    iteration: Optional[int] = None
    microbatch: Optional[int] = None
    lanes: Optional[int] = None
    num_steps: Optional[int] = None
    """Optimizer steps that a bundle finished in this run of quanta."""
    num_quanta: Optional[int] = None
    mode: Optional[str] = None
    """On iterations: bubbles, closed, or open (see `hooks.reporter`)."""

    @property
    def end_ns(self) -> int:
        return self.t_ns + self.dur_ns


def read_boot_id() -> str:
    """The kernel's boot id; empty where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


class TimelineWriter:
    """Collects events in memory and appends them to one file when told to.

    The file is started anew. Events beyond `max_events` are counted in `num_dropped` and not kept.

    Args:
        path: File to write; its directory must exist.
        node: Slurm's name of the node.
        job_id: The job that the recording process belongs to.
        rank: Node-local rank of the recorded slot.
    """

    def __init__(
        self,
        path: Path,
        node: str,
        job_id: int,
        rank: int,
        *,
        clock: Optional[Clock] = None,
        max_events: int = MAX_EVENTS,
    ) -> None:
        clock = clock or SystemClock()
        self.path, self.max_events = path, max_events
        self.num_events = self.num_dropped = 0
        self._pending: list[tuple[Any, ...]] = []
        self.header = TimelineHeader(node, job_id, rank, read_boot_id(), clock.monotonic_ns(), clock.wall_s())
        document = {"format": FORMAT, "version": VERSION, **vars(self.header)}
        path.write_text(json.dumps(document) + "\n", encoding="utf-8")

    def add(
        self,
        kind: str,
        t_ns: int,
        dur_ns: int = 0,
        *,
        stage: Optional[int] = None,
        iteration: Optional[int] = None,
        microbatch: Optional[int] = None,
        lanes: Optional[int] = None,
        num_steps: Optional[int] = None,
        num_quanta: Optional[int] = None,
        mode: Optional[str] = None,
    ) -> None:
        """Record one event; no input or output happens here."""
        if self.num_events >= self.max_events:
            self.num_dropped += 1
            return
        self.num_events += 1
        self._pending.append((t_ns, dur_ns, kind, stage, iteration, microbatch, lanes, num_steps, num_quanta, mode))

    def flush(self) -> int:
        """Append what was recorded since the last flush; returns the number of events written."""
        if not self._pending:
            return 0
        events, self._pending = self._pending, []
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(map(_to_line, events))
        return len(events)


def read_timeline(path: Path) -> tuple[TimelineHeader, list[TimelineEvent]]:
    """Read a whole timeline.

    A last line without its newline is left out: its writer was killed, or is still writing.

    Raises:
        FormatError: Not a timeline, another version, or a line that is too long or not an event.
        OSError: The file cannot be read.
    """
    lines = _read_lines(path)
    header = _to_header(next(lines, b""), path)
    return header, [_to_event(line, f"{path}: line {number}") for number, line in enumerate(lines, start=2)]


def _read_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for number in range(1, MAX_EVENTS + 3):
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line.endswith(b"\n"):
                if len(line) > MAX_LINE_BYTES:
                    raise FormatError(f"{path}: line {number}: got more than {MAX_LINE_BYTES} bytes, needed one event")
                return
            yield line
    raise FormatError(f"{path}: got more than {MAX_EVENTS} events; record for a shorter time")


def _parse(line: bytes, origin: str) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{origin}: not JSON ({error})") from None
    if not isinstance(document, dict):
        raise FormatError(f"{origin}: got {type(document).__name__}, needed a JSON object")
    return document


def _take(document: dict[str, Any], name: str, kind: type, origin: str) -> Any:
    value = document.get(name)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise FormatError(f"{origin}: {name}: got {value!r}, needed {kind.__name__}")
    return value


def _to_header(line: bytes, path: Path) -> TimelineHeader:
    origin = f"{path}: line 1"
    document = _parse(line, origin) if line else {}
    found = (document.get("format"), document.get("version"))
    if found != (FORMAT, VERSION):
        raise FormatError(
            f"{path}: got format {found[0]!r} version {found[1]!r}, needed {FORMAT!r} version {VERSION}; "
            "is this a recorded timeline?"
        )
    return TimelineHeader(
        node=_take(document, "node", str, origin),
        job_id=_take(document, "job_id", int, origin),
        rank=_take(document, "rank", int, origin),
        boot_id=_take(document, "boot_id", str, origin),
        anchor_monotonic_ns=_take(document, "anchor_monotonic_ns", int, origin),
        anchor_wall_s=_take(document, "anchor_wall_s", float, origin),
    )


def _to_event(line: bytes, origin: str) -> TimelineEvent:
    document = _parse(line, origin)
    kind = _take(document, "kind", str, origin)
    if kind not in KINDS:
        raise FormatError(f"{origin}: got kind {kind!r}, needed one of {', '.join(sorted(KINDS))}")
    dur_ns = _take(document, "dur_ns", int, origin)
    if dur_ns < 0:
        raise FormatError(f"{origin}: dur_ns: got {dur_ns}, needed 0 or more")
    optional = {name: _take(document, name, int, origin) for name in OPTIONAL_FIELDS if document.get(name) is not None}
    mode = None if document.get("mode") is None else _take(document, "mode", str, origin)
    return TimelineEvent(_take(document, "t_ns", int, origin), dur_ns, kind, **optional, mode=mode)


def _to_line(event: tuple[Any, ...]) -> str:
    t_ns, dur_ns, kind, *rest = event
    document = {"t_ns": t_ns, "dur_ns": dur_ns, "kind": kind}
    document.update((name, rest[i]) for i, name in enumerate((*OPTIONAL_FIELDS, "mode")) if rest[i] is not None)
    return json.dumps(document) + "\n"
