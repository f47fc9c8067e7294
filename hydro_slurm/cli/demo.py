"""`hydro demo`: the whole system on one machine, with the proof that the host job is not slowed."""

from __future__ import annotations

import argparse
from pathlib import Path

from hydro_slurm.demo.run import DemoSettings, run_demo
from hydro_slurm.errors import ConfigError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="the whole system on one machine, with the proof",
        description="Start a private Slurm cluster on this machine, train a character-level GPT in two pipeline stages "
        "with DeepSpeed, run a study in its bubbles, and measure what that did to the host job.",
    )
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder for summary.json (%(default)s)")
    parser.add_argument("--nodes", type=int, default=4, help="nodes of the cluster (%(default)s)")
    parser.add_argument("--trials", type=int, default=112, help="trials of the study (%(default)s)")
    parser.add_argument(
        "--block-iterations", type=int, default=5, help="host iterations in each measured block (%(default)s)"
    )
    parser.add_argument("--limit-s", type=float, default=900.0, help="give up after this (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="order of the measured blocks (%(default)s)")
    parser.set_defaults(func=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    if arguments.nodes < 3:
        raise ConfigError(f"--nodes must be at least 3 (two stages and the study), got {arguments.nodes}")
    if arguments.trials < 4:
        raise ConfigError(f"--trials must be at least 4, got {arguments.trials}")
    if arguments.block_iterations < 3:
        raise ConfigError(f"--block-iterations must be at least 3, got {arguments.block_iterations}")
    run_demo(
        DemoSettings(
            output=arguments.output,
            num_nodes=arguments.nodes,
            num_trials=arguments.trials,
            block_iterations=arguments.block_iterations,
            limit_s=arguments.limit_s,
            seed=arguments.seed,
        )
    )
    return 0
