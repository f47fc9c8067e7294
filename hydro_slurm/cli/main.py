"""`hydro`: one command, one file per group of subcommands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from hydro_slurm import __version__
from hydro_slurm.cli import demo, study, surrogate, testbed
from hydro_slurm.errors import HydroError
from hydro_slurm.log import set_up_logging


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="hydro", description="Run hyperparameter sweeps in the pipeline bubbles of training jobs on Slurm."
    )
    parser.add_argument("--version", action="version", version=f"hydro {__version__}")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="log more; twice for everything")
    subparsers = parser.add_subparsers(dest="group", metavar="COMMAND", required=True)
    for group in (study, surrogate, testbed, demo):
        group.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0, 1 for what the user can mend, 2 for wrong arguments."""
    parser = make_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        if not getattr(arguments, "takes_sbatch_options", False):
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        arguments.sbatch_options = unknown
    set_up_logging(arguments.verbose)
    try:
        status: int = arguments.func(arguments)
        sys.stdout.flush()
        return status
    except HydroError as error:
        print(f"hydro: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hydro: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
