"""Does a surrogate train alike at every width? The size of each module's change must not depend on it.

A model is trained for a few steps at several widths, each parametrized as the surrogate of the widest. For every module
and step: the mean absolute change of its output on a fixed batch, and the slope of that over width on log-log axes.

Source: Yang et al., Tensor Programs V (2022), appendix D.1; the limits are those that passed every correct case tried
and caught standard parametrization, unscaled experts and an unhooked tied head.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hydro_slurm.errors import SurrogateError
from hydro_trials.fusion.program import boundary_modules
from hydro_trials.fusion.trainer import FusedTrainer
from hydro_trials.hyperparameters import resolve_hyperparameters
from hydro_trials.study import Data, Study
from hydro_trials.surrogate.surrogate import Surrogate, make_surrogate

MAX_MEDIAN_SLOPE = 0.2
MAX_LATE_SLOPE = 0.3
LATE_STEP = 3


@dataclass(frozen=True)
class CoordinateCheck:
    """What was measured. Keys are module names; lists run over steps 1, 2, …"""

    width_scales: tuple[float, ...]
    changes: dict[str, list[list[float]]]
    """Mean absolute change of the output since step 0: one list over width scales per step."""
    slopes: dict[str, list[float]]
    """Slope of log change over log width; 0 means that width does not matter."""

    @property
    def problems(self) -> list[str]:
        """Why the parametrization is to be distrusted; empty where it is sound."""
        found = []
        every = [abs(slope) for slopes in self.slopes.values() for slope in slopes]
        if statistics.median(every) > MAX_MEDIAN_SLOPE:
            found.append(f"the median |slope| is {statistics.median(every):.2f}, more than {MAX_MEDIAN_SLOPE}")
        for name, slopes in self.slopes.items():
            late = max(slopes[LATE_STEP - 1 :], default=0.0)
            if late > MAX_LATE_SLOPE:
                found.append(f"module {name} grows with width: slope {late:+.2f}, more than +{MAX_LATE_SLOPE}")
        return found


def check_coordinates(
    study: Study,
    data: Data,
    params: dict[str, float],
    width_scales: Sequence[float],
    *,
    num_steps: int = 4,
    num_seeds: int = 4,
    shrink: Callable[[float], Surrogate] | None = None,
) -> CoordinateCheck:
    """Train the study's model at each width and compare.

    Args:
        study: Gives model, loss and optimizer.
        data: Its data; the first validation samples are what outputs are compared on.
        params: Hyperparameters of all lanes.
        width_scales: At least three values of S.
        num_steps: Optimizer steps.
        num_seeds: Initialisations to average over; they are lanes of one bundle.
        shrink: Makes the surrogate of a width scale; the study's own by default.

    Raises:
        SurrogateError: Fewer than three width scales, or the model cannot be shrunk by one of them.
    """
    if len(set(width_scales)) < 3:
        raise SurrogateError(f"got width scales {list(width_scales)}, needed at least three different ones")
    shrink = shrink or (
        lambda scale: make_surrogate(study.build, scale, study.optimizer, parameter_kinds=study.parameter_kinds)
    )
    values = resolve_hyperparameters(study.optimizer, study.schedule, study.fixed, params)
    x_N = data.valid[0][: study.batch_size]
    changes: dict[str, list[list[float]]] = {}
    for scale in width_scales:
        trainer = FusedTrainer(study, shrink(scale), data, study.steps, lambda site: None)
        for seed in range(num_seeds):
            trainer.admit(seed, seed, values)
        module = trainer.surrogate.make(0)
        before = [_outputs(module, trainer, seed, x_N) for seed in range(num_seeds)]
        for step in range(num_steps):
            trainer.step()
            after = [_outputs(module, trainer, seed, x_N) for seed in range(num_seeds)]
            for name in before[0]:
                size = [float((a[name] - b[name]).abs().mean()) for a, b in zip(after, before, strict=True)]
                steps = changes.setdefault(name, [[] for _ in range(num_steps)])
                steps[step].append(statistics.fmean(size))
    slopes = {name: [_slope(width_scales, sizes) for sizes in steps] for name, steps in changes.items()}
    return CoordinateCheck(tuple(width_scales), changes, slopes)


def _outputs(module: nn.Module, trainer: FusedTrainer, trial: int, x_N: Tensor) -> dict[str, Tensor]:
    """Outputs of every module that owns parameters, for one lane."""
    recorded: dict[str, Tensor] = {}
    owners = set(boundary_modules(module))
    hooks = []
    for name, part in module.named_modules():
        if part in owners:

            def record(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
                if isinstance(output, Tensor):
                    recorded[name or "(model)"] = output

            hooks.append(part.register_forward_hook(record))
    state = trainer.state(trial)
    module.eval()
    with torch.no_grad():
        functional_call(module, {**state.parameters, **state.buffers}, (x_N,))
    for hook in hooks:
        hook.remove()
    return recorded


def _slope(width_scales: Sequence[float], sizes: Sequence[float]) -> float:
    """Least-squares slope of log size over log width."""
    if not all(math.isfinite(size) and size > 0 for size in sizes):
        return math.inf if not all(map(math.isfinite, sizes)) else 0.0
    return statistics.linear_regression([-math.log(scale) for scale in width_scales], [math.log(s) for s in sizes])[0]
