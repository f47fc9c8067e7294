"""Replay of a run of the testbed from what was known before it, and the comparison with what it did.

A recording holds two parts. `before` has what was known before the run: the cluster, each job with its submit time
and description, profiles and overheads measured in an earlier calibration. The replay gets this part and nothing
else. `observed` has what the cluster and the studies did, and is read after the replay has ended.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydro_sim.metrics import Row
from hydro_sim.report import page, table
from hydro_sim.results import to_csv
from hydro_sim.scenario import decode
from hydro_sim.settings import Scenario
from hydro_sim.simulation import Simulation, build
from hydro_slurm.errors import FormatError, SimulationError
from hydro_slurm.formats import write_text_atomic

FORMAT, VERSION = "hydro.testbed-run", 1


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded run."""

    before: dict[str, Any]
    """A scenario as it would stand in TOML."""
    hosts: dict[str, dict[str, float | None]]
    """By host: submit_s, start_s, end_s (null if it ran for longer than was recorded), since a common moment."""
    studies: dict[str, dict[str, float]]
    """By study: submit_s, start_s (first bundle), end_s."""
    trials_per_slot: dict[str, int]
    """Trials that were started, by host: its slots are alike."""
    about: str


def read_recording(path: Path) -> Recording:
    """Read a recording.

    Raises:
        FormatError: It cannot be read, or is no recording.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = (document.get("format"), document.get("version"))
        if found != (FORMAT, VERSION):
            raise FormatError(f"{path}: got format {found[0]!r} version {found[1]!r}, needed {FORMAT!r} {VERSION}")
        observed = document["observed"]
        return Recording(
            document["before"], observed["hosts"], observed["studies"], observed["trials_per_host"], document["about"]
        )
    except OSError as error:
        raise FormatError(f"cannot read the recording {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path}: not a recording of a testbed run: {error!r}") from None


def replay(recording: Recording, folder: Path) -> Simulation:
    """Simulate what was known before the run."""
    scenario = decode(Scenario, recording.before, "before")
    simulation = build(scenario, folder)
    simulation.run()
    return simulation


def validate(path: Path, output: Path) -> Row:
    """Replay a recording and write how far the replay is from what happened.

    Returns:
        The summary: makespans, errors as fractions, and the table of jobs.
    """
    recording = read_recording(path)
    simulation = replay(recording, path.parent)
    rows = _rows(recording, simulation)
    observed_s = _makespan_s(recording.studies)
    if not all(study.end_s >= 0 for study in simulation.studies):
        raise SimulationError(f"{path}: in the replay not all studies end, because their hosts are gone before")
    predicted_s = max(study.end_s for study in simulation.studies) - min(s.submit_s for s in simulation.studies)
    starts = [float(row["start_error_s"]) for row in rows if row["start_error_s"] != ""]
    launched = _trials_per_host(simulation)
    trial_rows = [
        {"host": host, "observed_trials": count, "predicted_trials": launched.get(host, 0)}
        for host, count in sorted(recording.trials_per_slot.items())
    ]
    found: Row = {
        "recording": path.name,
        "hosts": len(recording.hosts),
        "studies": len(recording.studies),
        "observed_makespan_s": round(observed_s, 3),
        "predicted_makespan_s": round(predicted_s, 3),
        "makespan_error": round(predicted_s / observed_s - 1, 6),
        "mean_absolute_start_error_s": round(statistics.fmean(map(abs, starts)), 3) if starts else None,
        "largest_absolute_start_error_s": round(max(map(abs, starts)), 3) if starts else None,
        "deviation": _explain(rows, observed_s, predicted_s),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_text_atomic(output / "jobs.csv", to_csv(rows))
    write_text_atomic(output / "trials.csv", to_csv(trial_rows))
    write_text_atomic(output / "summary.json", json.dumps(found, indent=1) + "\n")
    figures = [{"figure": name.replace("_", " "), "value": value} for name, value in found.items()]
    parts = [f"<h1>Validation: {path.name}</h1>", f"<p>{recording.about}</p>", table(figures)]
    parts += ["<h2>Jobs</h2>", table(rows), "<h2>Trials by host</h2>", table(trial_rows)]
    write_text_atomic(output / "report.html", page("Validation", parts))
    return found


def _makespan_s(studies: dict[str, dict[str, float]]) -> float:
    return max(each["end_s"] for each in studies.values()) - min(each["submit_s"] for each in studies.values())


def _rows(recording: Recording, simulation: Simulation) -> list[Row]:
    predicted = {host.id: (host.first_start_s, host.end_s) for host in simulation.hosts}
    predicted |= {study.id: (study.start_s, study.end_s) for study in simulation.studies}
    rows = []
    groups: list[tuple[str, Mapping[str, Mapping[str, float | None]]]] = [
        ("host", recording.hosts),
        ("study", recording.studies),
    ]
    for kind, observed in groups:
        for name, times in sorted(observed.items()):
            row: Row = {"job": name, "kind": kind, "submit_s": _rounded(times["submit_s"])}
            for what, value in zip(("start", "end"), predicted.get(name, (None, None)), strict=True):
                seen = times[f"{what}_s"]
                row |= {f"observed_{what}_s": _rounded(seen), f"predicted_{what}_s": _rounded(value)}
                row[f"{what}_error_s"] = "" if seen is None or value is None else _rounded(value - seen)
            rows.append(row)
    return rows


def _rounded(value: float | None) -> float | str:
    return "" if value is None else round(value, 3)


def _trials_per_host(simulation: Simulation) -> dict[str, int]:
    counts: defaultdict[str, int] = defaultdict(int)
    for record in simulation.overlay.running.records:
        counts[record.host] += record.num_trials
    return dict(counts)


def _explain(rows: list[Row], observed_s: float, predicted_s: float) -> str:
    """Which part of the deviation was there before the work began, and which came while it ran."""
    studies = [row for row in rows if row["kind"] == "study" and row["start_error_s"] != ""]
    last = max(studies, key=lambda row: float(row["observed_end_s"]))
    late_s = float(last["start_error_s"])
    rest_s = predicted_s - observed_s - late_s
    return (
        f"{predicted_s - observed_s:+.1f} s of {observed_s:.1f} s: {late_s:+.1f} s until {last['job']} had its first "
        f"bundle, {rest_s:+.1f} s in its throughput, pruning and end"
    )
