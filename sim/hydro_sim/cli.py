"""`hydro-sim`: simulate, compare, sweep, import, validate, report."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hydro_sim import sacct_import, validation
from hydro_sim.metrics import Row
from hydro_sim.progress import ProgressBar
from hydro_sim.results import write_results
from hydro_sim.scenario import read_scenario
from hydro_sim.show import show
from hydro_sim.simulation import build
from hydro_sim.variants import (
    Point,
    figures,
    parse_setting,
    points_of_sweeps,
    points_of_variants,
    run_points,
    write_variants,
)
from hydro_slurm import __version__
from hydro_slurm.errors import ConfigError, HydroError

EXIT_INTERRUPTED = 130


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="hydro-sim", description="Simulate what bubble sharing would do for a cluster, by the daemon's own policy."
    )
    parser.add_argument("--version", action="version", version=f"hydro-sim {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="run a scenario", description="Run a scenario; write tables and a report.")
    _add_scenario(run, "build/sim/run")
    run.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting")
    run.add_argument("--seed", type=int, help="instead of the scenario's seed")
    run.set_defaults(func=_run)

    compare = commands.add_parser(
        "compare",
        help="run a scenario and its variants",
        description="Run a scenario and its [variants], each with and without bubbles, side by side.",
    )
    _add_scenario(compare, "build/sim/compare")
    _add_processes(compare)
    compare.set_defaults(func=_compare)

    sweep = commands.add_parser(
        "sweep",
        help="run a scenario over values of its settings",
        description="Run the scenario's [sweeps], or one over the values that --set gives, over processes.",
    )
    _add_scenario(sweep, "build/sim/sweep")
    sweep.add_argument(
        "--set", action="append", default=[], metavar="NAME=V,V", help="a setting and its values; all are combined"
    )
    _add_processes(sweep)
    sweep.set_defaults(func=_sweep)

    validate = commands.add_parser(
        "validate",
        help="replay a recorded run and compare",
        description="Replay a run of the testbed from what was known before it, and compare with what it did.",
    )
    validate.add_argument("recording", type=Path, help="the recording's file")
    validate.add_argument("--output", type=Path, default=Path("build/sim/validate"), help="folder (%(default)s)")
    validate.add_argument("--json", action="store_true", help="print one JSON object")
    validate.set_defaults(func=_validate)

    importer = commands.add_parser(
        "import",
        help="turn sacct's output into a scenario",
        description=f"Turn the output of sacct into a scenario. Make the file by: {sacct_import.COMMAND}",
    )
    importer.add_argument("file", type=Path, help="the output of sacct --parsable2")
    importer.add_argument("--output", type=Path, required=True, help="folder for the scenario")
    importer.add_argument("--time-zone", default="", help="of the times in the file, like Europe/Berlin (UTC)")
    importer.add_argument("--devices-per-node", type=int, default=8, help="(%(default)s)")
    importer.add_argument(
        "--nodes", action="append", default=[], metavar="PARTITION=N", help="nodes of a partition, instead of a guess"
    )
    importer.set_defaults(func=_import)

    report = commands.add_parser(
        "report", help="show a run's results", description="Show the summary of a folder of results."
    )
    report.add_argument("folder", type=Path, help="what run, compare, sweep or validate has written")
    report.add_argument("--json", action="store_true", help="print one JSON object")
    report.set_defaults(func=_report)
    return parser


def _add_scenario(parser: argparse.ArgumentParser, output: str) -> None:
    parser.add_argument("scenario", type=Path, help="a scenario's TOML file")
    parser.add_argument("--output", type=Path, default=Path(output), help="folder for the results (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time (%(default)s)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0, 1 for what the user can mend, 2 for wrong arguments."""
    arguments = make_parser().parse_args(argv)
    try:
        status: int = arguments.func(arguments)
        sys.stdout.flush()
        return status
    except HydroError as error:
        print(f"hydro-sim: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hydro-sim: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: argparse.Namespace) -> int:
    file = read_scenario(arguments.scenario)
    changes: dict[str, object] = {}
    for text in arguments.set:
        name, values = parse_setting(text)
        if len(values) != 1:
            raise ConfigError(f"--set {text}: `run` takes one value; several are for `sweep`")
        changes[name] = values[0]
    if arguments.seed is not None:
        changes["seed"] = arguments.seed
    simulation = build(file.scenario(changes), file.folder)
    if not arguments.json and simulation.trace is not None:
        print("\n".join(simulation.trace.describe()))
    bar = ProgressBar()
    simulation.run(bar.show)
    bar.close()
    _print(write_results(simulation, arguments.output), arguments)
    if simulation.interrupted:
        print("hydro-sim: interrupted; what was done is kept", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    file = read_scenario(arguments.scenario)
    return _run_groups(arguments, {"variants": points_of_variants(file)}, plotted=False)


def _sweep(arguments: argparse.Namespace) -> int:
    file = read_scenario(arguments.scenario)
    return _run_groups(arguments, points_of_sweeps(file, dict(map(parse_setting, arguments.set))), plotted=True)


def _run_groups(arguments: argparse.Namespace, groups: dict[str, list[Point]], *, plotted: bool) -> int:
    bar = ProgressBar()
    points = [point for group in groups.values() for point in group]
    found = run_points(
        arguments.scenario,
        points,
        max(arguments.processes, 1),
        lambda done, total: bar.show(done / total, f"{done} of {total} runs"),
    )
    bar.close()
    places = iter(range(len(points)))
    results = {
        name: [(point, found[place]) for point, place in zip(group, places, strict=False) if place in found]
        for name, group in groups.items()
    }
    title = read_scenario(arguments.scenario).scenario().name
    write_variants(arguments.output, title, results, plotted=plotted)
    if arguments.json:
        print(json.dumps({name: [figures(*each) for each in pairs] for name, pairs in results.items()}))
    else:
        for name, pairs in results.items():
            print(f"{name}:")
            for point, row in pairs:
                reduction = f"  {row['reduction']:.2f} times shorter by bubbles" if row["reduction"] else ""
                makespan = f"{row['makespan_h']:.2f} h" if row["makespan_h"] is not None else "not all have ended"
                print(f"  {point.name:<48} makespan {makespan:>12}{reduction}")
        print(f"written to {arguments.output}")
    if len(found) < len(points):
        print("hydro-sim: interrupted; the runs that were done are kept", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _validate(arguments: argparse.Namespace) -> int:
    _print(validation.validate(arguments.recording, arguments.output), arguments)
    return 0


def _import(arguments: argparse.Namespace) -> int:
    nodes = {}
    for text in arguments.nodes:
        name, _, count = text.partition("=")
        if not count.isdigit() or int(count) < 1:
            raise ConfigError(f"--nodes {text}: needed PARTITION=N")
        nodes[name] = int(count)
    for line in sacct_import.import_sacct(
        arguments.file, arguments.output, arguments.time_zone, arguments.devices_per_node, nodes
    ):
        print(line)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    for name in ("summary.json", "summaries.json"):
        path = arguments.folder / name
        if path.is_file():
            document = json.loads(path.read_text(encoding="utf-8"))
            print(json.dumps(document) if arguments.json else show(document))
            if not arguments.json:
                print(f"the whole report: {arguments.folder / 'report.html'}")
            return 0
    raise ConfigError(f"{arguments.folder} holds no results: neither summary.json nor summaries.json")


def _print(found: Row, arguments: argparse.Namespace) -> None:
    print(json.dumps(found) if arguments.json else show(found))
    if not arguments.json:
        print(f"written to {arguments.output}")


if __name__ == "__main__":
    sys.exit(main())
