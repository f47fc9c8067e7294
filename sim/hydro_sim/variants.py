"""Several runs of one scenario with some settings changed: side by side over processes."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydro_sim.metrics import Row, summary
from hydro_sim.plots import line_plot
from hydro_sim.report import page, table
from hydro_sim.results import to_csv
from hydro_sim.scenario import ScenarioFile, read_scenario
from hydro_sim.simulation import build
from hydro_slurm.errors import ConfigError
from hydro_slurm.formats import write_text_atomic

NO_BUBBLES: dict[str, object] = {"bubbles.enabled": False}


@dataclass(frozen=True, slots=True)
class Point:
    """One variant: what it is called, and which settings it changes."""

    name: str
    changes: tuple[tuple[str, object], ...]


def run_point(path: Path, point: Point) -> Row:
    """Run one variant, with and without bubbles where the scenario has hosts.

    Returns:
        Its summary, with `makespan_without_bubbles_h` and `reduction` added.
    """
    file = read_scenario(path)
    changes = dict(point.changes)
    simulation = build(file.scenario(changes), file.folder)
    simulation.run()
    if simulation.interrupted:
        raise KeyboardInterrupt  # part of a run is no result to compare
    found = summary(simulation)
    found["makespan_without_bubbles_h"] = found["reduction"] = None
    if (
        simulation.hosts
        and simulation.scenario.bubbles.enabled
        and all(study.config.exclusive_devices for study in simulation.studies)
    ):
        without = build(file.scenario({**changes, **NO_BUBBLES}), file.folder)
        without.run()
        if without.interrupted:
            raise KeyboardInterrupt
        alone_h = summary(without)["makespan_h"]
        found["makespan_without_bubbles_h"] = alone_h
        if alone_h and found["makespan_h"]:
            found["reduction"] = round(alone_h / found["makespan_h"], 6)
    return found


def points_of_variants(file: ScenarioFile) -> list[Point]:
    """The scenario itself, and its `[variants]`."""
    variants = file.scenario().variants
    return [Point("scenario", ()), *(Point(name, tuple(changes.items())) for name, changes in variants.items())]


def points_of_sweeps(file: ScenarioFile, extra: Mapping[str, Sequence[object]] | None = None) -> dict[str, list[Point]]:
    """Every point of each sweep: all combinations of the values of its settings.

    Args:
        file: The scenario, whose `[sweeps]` are taken.
        extra: Values by dotted name, given on the command line: they make a sweep of their own, and the only one.
    """
    sweeps: Mapping[str, Mapping[str, Sequence[object]]] = {"sweep": extra} if extra else file.scenario().sweeps
    if not sweeps:
        raise ConfigError(f"{file.path} has no [sweeps]; name settings by --set, for example hosts.0.devices=8,16,32")
    found = {}
    for name, values in sweeps.items():
        combinations = itertools.product(*([(key, value) for value in items] for key, items in values.items()))
        found[name] = [Point(", ".join(f"{k}={v}" for k, v in chosen), tuple(chosen)) for chosen in combinations]
    for points in found.values():
        for point in points:
            file.scenario(dict(point.changes))  # a wrong name is said before an hour of others has run
    return found


def run_points(
    path: Path, points: Sequence[Point], num_processes: int, done: Callable[[int, int], None]
) -> dict[int, Row]:
    """Run variants over processes.

    Returns:
        Summaries by place in `points`; after Ctrl-C those that were done, or under way then.
    """
    results: dict[int, Row] = {}
    if num_processes == 1 or len(points) == 1:
        try:
            for index, point in enumerate(points):
                results[index] = run_point(path, point)
                done(len(results), len(points))
        except KeyboardInterrupt:
            pass
        return results
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context, initializer=_ignore_interrupts) as pool:
        pending: dict[Future[Row], int] = {
            pool.submit(run_point, path, point): index for index, point in enumerate(points)
        }
        try:
            while pending:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    results[pending.pop(future)] = future.result()
                    done(len(results), len(points))
        except KeyboardInterrupt:
            pool.shutdown(wait=True, cancel_futures=True)
            results |= {index: each.result() for each, index in pending.items() if not each.cancelled()}
    return results


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def figures(point: Point, found: Row) -> Row:
    """What a table of variants shows."""
    return {
        "variant": point.name,
        "makespan_h": found["makespan_h"] if found["makespan_h"] is not None else "",
        "makespan_without_bubbles_h": found["makespan_without_bubbles_h"] or "",
        "reduction": found["reduction"] or "",
        "jct_mean_h": found["jct_h"]["mean"],
        "queueing_delay_mean_h": found["queueing_delay_h"]["mean"],
        "base_queueing_delay_mean_h": found["base_queueing_delay_h"]["mean"],
        "harvested_device_h": found["harvested_device_h"],
        "studies_ended": found["studies_ended"],
        "host_slowdown_assumed": found["host_slowdown_assumed"],
    }


def write_variants(
    folder: Path, title: str, groups: Mapping[str, Sequence[tuple[Point, Row]]], *, plotted: bool
) -> None:
    """Write variants.csv, summaries.json and report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"group": name, **figures(point, found)} for name, group in groups.items() for point, found in group]
    write_text_atomic(folder / "variants.csv", to_csv(rows))
    documents = {name: {point.name: found for point, found in group} for name, group in groups.items()}
    write_text_atomic(folder / "summaries.json", json.dumps(documents, indent=1) + "\n")
    parts = [f"<h1>{title}</h1>"]
    if plotted:
        parts += _sensitivity(groups)
    for name, group in groups.items():
        parts += [f"<h2>{name}</h2>", table([figures(point, found) for point, found in group], most=200)]
    write_text_atomic(folder / "report.html", page(title, parts))


def _sensitivity(groups: Mapping[str, Sequence[tuple[Point, Row]]]) -> list[str]:
    """One plot per sweep: its first setting along the axis, one line for each value of the others."""
    parts = []
    for name, group in groups.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        label = ""
        for point, found in group:
            if not point.changes:
                continue
            (label, x), *others = point.changes
            y = found["reduction"] or found["makespan_h"]
            if y and isinstance(x, (int, float)):
                lines.setdefault(", ".join(f"{k.split('.')[-1]}={v}" for k, v in others) or name, []).append((x, y))
        if any(len(line) > 1 for line in lines.values()):
            with_reduction = any(found["reduction"] for _, found in group)
            y_label = "makespan reduction by bubbles" if with_reduction else "makespan, hours"
            plot = line_plot([(key, sorted(line)) for key, line in lines.items()], label, y_label)
            parts += [f"<h2>Sensitivity: {name}</h2>", plot]
    return parts


def parse_setting(text: str) -> tuple[str, list[Any]]:
    """`hosts.0.devices=8,16` as a name and its values.

    Raises:
        ConfigError: It is not of that form.
    """
    name, sign, values = text.partition("=")
    if not sign or not name or not values:
        raise ConfigError(f"got {text!r}, needed NAME=VALUE[,VALUE…], for example bubbles.throughput_share=0.1,0.2")
    return name, [_value(item) for item in values.split(",")]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
