"""What `coordinates` and `sweep` are asked for, looked at before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from optuna.distributions import BaseDistribution, CategoricalDistribution

from hydro_slurm.errors import SurrogateError

SUFFIXES = (".html", ".svg")


def check_output(output: Path | None) -> None:
    """Refuse a file that could not be written, or would not be what its name says.

    Raises:
        SurrogateError: Another suffix than `SUFFIXES`, or no such folder.
    """
    if output is None:
        return
    if output.suffix not in SUFFIXES:
        raise SurrogateError(f"--output {output}: needed a name that ends with {' or '.join(SUFFIXES)}")
    if output.is_dir():
        raise SurrogateError(f"--output {output}: is a folder, needed a file; name one in it")
    if not output.absolute().parent.is_dir():
        raise SurrogateError(f"--output {output}: there is no folder {output.absolute().parent}; make it first")


def check_scale_argument(option: str, scale: float) -> None:
    """Refuse what is no width scale.

    Raises:
        SurrogateError: Below 1, or not finite.
    """
    if not 1 <= scale < math.inf:
        raise SurrogateError(f"{option}: got {scale:g}, needed a number of 1 or more (1 is the target itself)")


def check_sweep_arguments(
    scales: Sequence[float] | None, num_lrs: int, num_steps: int | None, num_seeds: int, num_configurations: int
) -> None:
    """Refuse numbers that no sweep can have.

    Raises:
        SurrogateError: The first one.
    """
    for scale in scales or ():
        check_scale_argument("--scales", scale)
    for option, value, least in (("--lrs", num_lrs, 2), ("--steps", num_steps, 1), ("--seeds", num_seeds, 1)):
        if value is not None and value < least:
            raise SurrogateError(f"{option}: got {value}, needed {least} or more")
    if num_configurations < 0 or num_configurations == 1:
        raise SurrogateError(
            f"--configurations: got {num_configurations}, needed 0 (none) or 2 or more, since rankings are compared"
        )


def lr_bounds(distribution: BaseDistribution | None) -> tuple[float, float]:
    """The lowest and the highest learning rate that a study searches.

    Raises:
        SurrogateError: It searches none, a list of values, or a range without extent.
    """
    needed = "needed space={'lr': hydro.Float(low, high, log=True)}"
    if distribution is None:
        raise SurrogateError(f"the study searches no learning rate, so there is nothing to sweep: {needed}")
    if isinstance(distribution, CategoricalDistribution):
        raise SurrogateError(
            f"the study searches lr among {list(distribution.choices)}, and a range is swept: {needed}"
        )
    low, high = float(getattr(distribution, "low")), float(getattr(distribution, "high"))  # noqa: B009
    if low >= high:
        raise SurrogateError(f"the study searches lr from {low:g} to {high:g}, which is one value: {needed}")
    return low, high
