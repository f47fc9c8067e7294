"""Any other table of jobs, by naming its columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hydro_sim.traces.table import RowError, SkipRow, Trace, TraceJob, moment, number, read_table, time_zone, whole
from hydro_slurm.errors import ConfigError

UNITS = {"s": 1.0, "ms": 1e-3, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnMapping:
    """Which column says what."""

    submit: str
    """Submit time: an ISO time, or a number in `unit` since the epoch."""
    devices: str
    duration: str = ""
    """Run time in `unit`; else `start` and `end` give it."""
    start: str = ""
    end: str = ""
    user: str = ""
    partition: str = ""
    name: str = ""
    unit: str = "s"
    """Of all numbers that are times: s, ms, min or h."""
    delimiter: str = ","

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ConfigError(f"trace.columns.unit must be one of {', '.join(UNITS)}, got {self.unit!r}")
        if not self.duration and not (self.start and self.end):
            raise ConfigError("trace.columns needs `duration`, or `start` and `end`")


def load_mapped(path: Path, mapping: ColumnMapping, *, zone: str = "") -> Trace:
    """Load a table whose columns the mapping names."""
    tz, scale = time_zone(zone), UNITS[mapping.unit]

    def time_s(row: Mapping[str, str], column: str) -> float:
        text = row[column]
        try:
            return float(text) * scale
        except ValueError:
            return moment(text, tz, column)

    def parse(row: Mapping[str, str]) -> TraceJob:
        submit_s = time_s(row, mapping.submit)
        waited_s = None
        if mapping.duration:
            duration_s = number(row, mapping.duration, least=0.0) * scale
        else:
            start_s = time_s(row, mapping.start)
            duration_s = time_s(row, mapping.end) - start_s
            waited_s = start_s - submit_s
        if duration_s < 0:
            raise RowError(f"it ends {-duration_s:g} s before it starts")
        num_devices = whole(row, mapping.devices)
        if num_devices == 0 or duration_s == 0:
            raise SkipRow("no device, or no time")
        user, partition, name = (
            row[column] if column else "" for column in (mapping.user, mapping.partition, mapping.name)
        )
        return TraceJob(submit_s, duration_s, num_devices, user, partition, name, waited_s=waited_s)

    wanted = [mapping.submit, mapping.devices, mapping.duration, mapping.start, mapping.end]
    wanted += [mapping.user, mapping.partition, mapping.name]
    return read_table(path, [name for name in wanted if name], parse, delimiter=mapping.delimiter)
