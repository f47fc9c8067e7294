"""`python -m hydro_trials VERB`: describe, check, profile a study file, report on its surrogate; train a bundle.

Whatever the user's file prints goes to stderr: stdout carries the answer and nothing else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hydro_slurm.errors import HydroError
from hydro_slurm.log import set_up_logging


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    arguments = _parser().parse_args(argv)
    set_up_logging(arguments.verbose)
    answer_descriptor = os.dup(1)
    os.dup2(2, 1)
    try:
        if arguments.verb == "train":
            from hydro_trials.runtime.train import train

            return train(arguments.bundle_dir.absolute())
        text = _answer(arguments)
    except HydroError as error:
        message = " ".join(str(error).split())
        os.write(2, f"hydro: {message}\n".encode())
        return 1
    with os.fdopen(answer_descriptor, "w", encoding="utf-8") as answer:
        answer.write(text + "\n")
    return 0


def _answer(arguments: argparse.Namespace) -> str:
    from hydro_trials.runtime.describe import describe_study

    if arguments.verb == "describe":
        return describe_study(arguments.file, as_json=arguments.json)
    from hydro_trials.runtime.check import check_study
    from hydro_trials.runtime.profile import profile_study

    if arguments.verb == "check":
        return check_study(arguments.file, as_json=arguments.json)
    if arguments.verb == "coordinates":
        from hydro_trials.runtime.surrogate_reports import report_coordinates

        return report_coordinates(arguments.file, arguments.output, arguments.scale, as_json=arguments.json)
    if arguments.verb == "sweep":
        from hydro_trials.runtime.surrogate_reports import report_sweep

        return report_sweep(
            arguments.file,
            arguments.output,
            scales=arguments.scales,
            num_lrs=arguments.lrs,
            num_steps=arguments.steps,
            num_seeds=arguments.seeds,
            num_configurations=arguments.configurations,
            as_json=arguments.json,
        )
    from hydro_trials.planner import Limits

    limits = Limits(
        max_lanes=arguments.max_lanes,
        cap_bytes=None if arguments.cap_mib is None else arguments.cap_mib << 20,
        quantum_ms=arguments.quantum_ms,
        budget_s=arguments.budget_s,
        num_steps=arguments.compile_steps,
    )
    return profile_study(
        arguments.file,
        arguments.output,
        arguments.lanes,
        limits,
        target=arguments.target,
        as_json=arguments.json,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hydro_trials", description="The data plane of hydro_slurm.")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="log more; twice logs everything")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (
        ("describe", "print what a study file defines"),
        ("check", "build and shrink the model, train it for a moment, and say what it costs"),
        ("profile", "measure memory and throughput at several fusion counts"),
        ("coordinates", "compare training at several widths, module by module"),
        ("sweep", "sweep the learning rate at several widths"),
    ):
        command = verbs.add_parser(verb, help=text, description=text)
        command.add_argument("file", type=Path, help="the study file")
        command.add_argument("--json", action="store_true", help="print one JSON object")
        if verb in ("coordinates", "sweep"):
            command.add_argument("--output", type=Path, help="file for the plot, .html or .svg")
        if verb == "coordinates":
            command.add_argument("--scale", type=float, help="width scale instead of the study's")
        if verb == "sweep":
            command.add_argument("--scales", type=float, nargs="+", help="width scales")
            command.add_argument("--lrs", type=int, default=9, help="number of learning rates")
            command.add_argument("--steps", type=int, help="steps of each run")
            command.add_argument("--seeds", type=int, default=2, help="seeds of each run")
            command.add_argument("--configurations", type=int, default=0, help="configurations to rank")
        if verb == "profile":
            command.add_argument("--output", type=Path, help="file to write the profile to")
            _add_profile_options(command)
    command = verbs.add_parser("train", help="train a bundle", description="Train the bundle in a directory.")
    command.add_argument("bundle_dir", type=Path, help="directory that holds spec.json")
    return parser


def _add_profile_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--target", action="store_true", help="measure the target instead of the surrogate")
    command.add_argument("--lanes", type=int, nargs="+", help="fusion counts to measure, instead of 1, 2, 4, …")
    command.add_argument("--max-lanes", type=int, default=64, help="largest fusion count (%(default)s)")
    command.add_argument("--cap-mib", type=int, help="memory that the process may take")
    command.add_argument("--quantum-ms", type=float, help="longest time between two boundaries that fits the bubbles")
    command.add_argument("--budget-s", type=float, default=120.0, help="time for measuring (%(default)s)")
    command.add_argument(
        "--compile-steps",
        type=int,
        default=0,
        help="try torch.compile too, and keep it if it pays within this many steps",
    )


if __name__ == "__main__":
    sys.exit(main())
