"""`hydro surrogate`: is the small model a fair stand-in for the large one?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hydro_slurm.study.data_plane import run_verb

CHECK_TIMEOUT_S = 3_600.0
SWEEP_TIMEOUT_S = 86_400.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the group to the command line."""
    about = "how well a study's surrogate stands for its target"
    group = subparsers.add_parser("surrogate", help=about, description=about)
    commands = group.add_subparsers(dest="command", metavar="COMMAND", required=True)

    check = commands.add_parser(
        "check",
        help="the coordinate check: does training look alike at every width?",
        description="Train FILE's model for a few steps at several widths and compare every module. Exits 1 where the "
        "surrogate would not transfer.",
    )
    check.add_argument("file", type=Path, metavar="FILE", help="the study file")
    check.add_argument("--scale", type=float, help="width scale to check instead of the study's")
    check.add_argument("--output", type=Path, help="file for the plot, .html or .svg (default: none)")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.set_defaults(func=_check)

    sweep = commands.add_parser(
        "sweep",
        help="learning-rate sweeps at several widths",
        description="Sweep FILE's learning rate at several widths, with muP and without, and compare how random "
        "configurations rank on surrogate and target.",
    )
    sweep.add_argument("file", type=Path, metavar="FILE", help="the study file")
    sweep.add_argument("--scales", type=float, nargs="+", help="width scales (default: the study's, halved down to 1)")
    sweep.add_argument("--lrs", type=int, default=9, help="number of learning rates (%(default)s)")
    sweep.add_argument("--steps", type=int, help="steps of each run (default: the study's)")
    sweep.add_argument("--seeds", type=int, default=2, help="seeds of each run (%(default)s)")
    sweep.add_argument("--configurations", type=int, default=0, help="configurations to rank (%(default)s)")
    sweep.add_argument("--output", type=Path, help="file for the plot, .html or .svg (default: none)")
    sweep.add_argument("--json", action="store_true", help="print one JSON object")
    sweep.set_defaults(func=_sweep)


def _check(arguments: argparse.Namespace) -> int:
    options = [] if arguments.scale is None else ["--scale", str(arguments.scale)]
    found = run_verb("coordinates", arguments.file, *options, *_output(arguments), timeout_s=CHECK_TIMEOUT_S)
    if arguments.json:
        print(json.dumps(found))
    else:
        widths = ", ".join(f"{scale:g}" for scale in found["width_scales"])
        verdict = "passed" if found["passed"] else "FAILED"
        print(f"coordinate check of {found['study']} at S = {widths}: {verdict}")
        for line in (*found["problems"], *(f"note: {warning}" for warning in found["warnings"])):
            print(f"  {line}")
        _say_output(found)
    return 0 if found["passed"] else 1


def _sweep(arguments: argparse.Namespace) -> int:
    options = ["--lrs", str(arguments.lrs), "--seeds", str(arguments.seeds)]
    options += ["--configurations", str(arguments.configurations)]
    if arguments.scales:
        options += ["--scales", *map(str, arguments.scales)]
    if arguments.steps is not None:
        options += ["--steps", str(arguments.steps)]
    found = run_verb("sweep", arguments.file, *options, *_output(arguments), timeout_s=SWEEP_TIMEOUT_S)
    if arguments.json:
        print(json.dumps(found))
        return 0
    for kind, words in (("mup", "with muP"), ("standard", "without muP")):
        best = "  ".join(
            f"S={each['width_scale']:g}: {_short(each['best_lr'])}"
            for each in found["sweeps"]
            if each["parametrization"] == kind
        )
        drift = found["drift_octaves"][kind]
        print(f"best lr {words}: {best}  (drift {'unknown' if drift is None else f'{drift:.2f} octaves'})")
    fidelity: dict[str, Any] | None = found["fidelity"]
    if fidelity:
        print(
            f"{fidelity['num_configurations']} configurations at S={fidelity['width_scale']:g}: "
            f"Kendall tau {fidelity['kendall_tau']:.2f}  "
            + "  ".join(f"regret@{k} {_short(value)}" for k, value in fidelity["regret"].items())
            + f"  seed noise {_short(fidelity['seed_noise'])}"
        )
    for warning in found["warnings"]:
        print(f"note: {warning}")
    _say_output(found)
    return 0


def _output(arguments: argparse.Namespace) -> list[str]:
    return [] if arguments.output is None else ["--output", str(arguments.output.absolute())]


def _say_output(found: dict[str, Any]) -> None:
    if found["output"]:
        print(f"plot: {found['output']}")


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
