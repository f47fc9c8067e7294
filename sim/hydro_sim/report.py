"""The report of one run: a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hydro_sim.metrics import Row
from hydro_sim.plots import cdf, gantt, line_plot
from hydro_sim.simulation import Simulation

MAX_GANTT_ROWS = 40
MAX_TABLE_ROWS = 60
NUM_BINS = 200

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; font-size: 13px; } td, th { padding: .15em .7em; border-bottom: 1px solid #ddd; }
td { text-align: right; } th { text-align: left; font-weight: 600; } td:first-child { text-align: left; }
svg { width: 100%; height: auto; font-size: 11px; } .grid { stroke: #ddd; stroke-width: .6; }
.label { background: #fff3d6; padding: .4em .8em; border-left: 4px solid #e39a2d; } .wide { overflow-x: auto; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole HTML page."""
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def table(rows: Sequence[Mapping[str, Any]], *, most: int = MAX_TABLE_ROWS) -> str:
    """Rows with the same keys as an HTML table."""
    if not rows:
        return "<p>none</p>"
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in rows[0])
    lines = [
        "<tr>" + "".join(f"<td>{escape(_text(value))}</td>" for value in row.values()) + "</tr>" for row in rows[:most]
    ]
    more = f"<p>and {len(rows) - most} more, in the CSV file</p>" if len(rows) > most else ""
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>{more}'


def render_report(simulation: Simulation, summary: Row, tables: Mapping[str, Sequence[Row]]) -> str:
    """The page."""
    scenario = simulation.scenario
    parts = [f"<h1>{escape(scenario.name)}</h1>", f"<p>{escape(scenario.description)}</p>", *_labels(simulation)]
    figures = {
        "makespan of the studies": _hours(summary["makespan_h"]),
        "JCT of a study, mean / p90": f"{_hours(summary['jct_h']['mean'])} / {_hours(summary['jct_h']['p90'])}",
        "queueing delay of a study, mean": _hours(summary["queueing_delay_h"]["mean"]),
        "queueing delay of the base load, mean": _hours(summary["base_queueing_delay_h"]["mean"]),
        "harvested from bubbles (as time of an exclusive device)": _hours(summary["harvested_device_h"]),
        "host slowdown": f"{100 * summary['host_slowdown_assumed']:g} % (assumed, see hosts)",
        "studies ended": f"{summary['studies_ended']} of {summary['studies']}",
        "jobs of the base load started": f"{summary['base_jobs_started']} of {summary['base_jobs']}",
        "events, decisions of the policy": f"{summary['events']}, {summary['decisions']}",
    }
    parts.append(table([{"figure": name, "value": value} for name, value in figures.items()]))
    parts.append("<h2>Assumptions</h2><ul>")
    parts += [f"<li>{escape(text)}</li>" for text in _assumptions(simulation)]
    parts.append("</ul><h2>Hosts and the bundles in their bubbles</h2>")
    parts.append(_gantt(simulation))
    parts += ["<h2>Studies: completion times and queueing delays</h2>", _study_cdfs(tables["studies"])]
    parts += ["<h2>Devices in use</h2>", _utilisation(simulation), table(tables["partitions"])]
    for name in ("studies", "hosts", "users"):
        parts += [f"<h2>{name.capitalize()}</h2>", table(tables[name])]
    return page(scenario.name, parts)


def _labels(simulation: Simulation) -> list[str]:
    labels = []
    if simulation.trace is not None and simulation.trace.synthetic:
        labels.append("The base load is synthetic.")
    if any(host.config.from_trace_devices for host in simulation.hosts):
        labels.append(
            "Hosts are jobs of the trace that are assumed to be pipeline-parallel; their bubbles are synthetic."
        )
    elif simulation.hosts:
        labels.append("Hosts are synthetic: the scenario describes them, no trace has recorded them.")
    if simulation.studies:
        labels.append("Studies are synthetic.")
    if simulation.interrupted:
        labels.append("The run was interrupted: this is what was done by then.")
    return [f'<p class="label">{escape(" ".join(labels))}</p>'] if labels else []


def _assumptions(simulation: Simulation) -> list[str]:
    scenario = simulation.scenario
    found = list(scenario.assumptions)
    found.append(f"Worth of bubbles: {scenario.bubbles.source}.")
    found.append(f"Overheads: {scenario.overheads.source}.")
    for host in scenario.hosts:
        found.append(f"Slowdown of {host.name}: {100 * host.slowdown:g} %, {host.slowdown_source}.")
    if simulation.trace is not None:
        found += [f"Base load: {line}." for line in simulation.trace.describe()]
    if simulation.too_large:
        found.append(f"{simulation.too_large} jobs of the trace are larger than their partition and are left out.")
    return found


def _gantt(simulation: Simulation) -> str:
    end_h = simulation.engine.now_s / 3600
    by_slot: dict[str, list[tuple[float, float, str, str]]] = {}
    for record in simulation.overlay.running.records:
        begin_h, finish_h = record.start_s / 3600, record.end_s / 3600
        tip = f"{record.id} {record.study} {record.purpose} lanes={record.num_lanes} {begin_h:.2f}..{finish_h:.2f} h"
        by_slot.setdefault(record.slot, []).append((begin_h, finish_h, record.study, tip))
    rows: list[tuple[str, list[tuple[float, float, str, str]]]] = []
    for host in simulation.hosts:
        if host.first_start_s >= 0:
            finish_h = host.end_s / 3600 if host.end_s >= 0 else end_h
            rows.append((host.id, [(host.first_start_s / 3600, finish_h, "host", host.id)]))
        rows += [(slot, bars) for slot, bars in sorted(by_slot.items()) if slot.startswith(f"{host.id}.")]
        if len(rows) >= MAX_GANTT_ROWS:
            break
    own = [(slot, bars) for slot, bars in sorted(by_slot.items()) if ".own." in slot]
    shown = (own[: MAX_GANTT_ROWS // 4] + rows)[:MAX_GANTT_ROWS]
    num_left = len(by_slot) + len(simulation.hosts) - len(shown)
    note = f"<p>{num_left} further rows are left out.</p>" if num_left > 0 else ""
    return gantt(shown, "hours", end_h) + note


def _study_cdfs(rows: Sequence[Row]) -> str:
    series = []
    for key, name in (("jct_h", "JCT"), ("queueing_delay_h", "queueing delay")):
        values = [float(row[key]) for row in rows if row[key] != ""]
        if values:
            series.append((name, cdf(values)))
    return line_plot(series, "hours", "share of studies", steps=True)


def _utilisation(simulation: Simulation) -> str:
    """Devices in use over time, by partition, as means over bins."""
    end_s = simulation.engine.now_s
    if end_s <= 0:
        return "<p>nothing to plot</p>"
    jobs, width = simulation.engine.jobs, end_s / NUM_BINS
    series = []
    for index, partition in enumerate(simulation.scenario.partitions):
        change = [0.0] * (NUM_BINS + 2)
        for job in range(len(jobs)):
            if simulation.engine.partition_of[job] != index or jobs.start_s[job] < 0:
                continue
            begin, finish = jobs.start_s[job], min(jobs.end_s[job], end_s)
            for moment_s, sign in ((begin, 1), (finish, -1)):
                place = moment_s / width
                whole = min(int(place), NUM_BINS)
                # The part of the bin behind the moment counts now, the rest from the next bin on.
                change[whole] += sign * jobs.devices[job] * (whole + 1 - place)
                change[whole + 1] += sign * jobs.devices[job] * (place - whole)
        level, line = 0.0, []
        for place in range(NUM_BINS):
            level += change[place]
            line.append((place * width / 3600, max(level, 0.0)))
        series.append((partition.name, line))
    return line_plot(series, "hours", "devices in use", steps=True)


def _hours(value: float | None) -> str:
    if value is None:
        return "not all have ended"
    return f"{value:.2f} h" if value < 1000 else f"{value:,.0f} h"


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
