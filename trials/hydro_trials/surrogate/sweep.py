"""Does the best learning rate stay? Sweeps at several widths, with muP and without, and rankings of configurations."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

from hydro_slurm.errors import SurrogateError
from hydro_trials.fusion.trainer import FusedTrainer
from hydro_trials.hyperparameters import resolve_hyperparameters
from hydro_trials.study import Data, Study
from hydro_trials.surrogate.fidelity import kendall_tau, regret_at
from hydro_trials.surrogate.scale import calm_params
from hydro_trials.surrogate.surrogate import Surrogate, standard_surrogate, study_surrogate


@dataclass(frozen=True)
class WidthSweep:
    """Losses over learning rates at one width."""

    width_scale: float
    parametrization: str
    """mup or standard."""
    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    """Mean over seeds; infinite where one diverged."""

    @property
    def at_edge(self) -> bool:
        """Whether the lowest loss is that of the smallest or largest learning rate: the minimum may lie outside."""
        lowest = min(self.losses)
        return math.isfinite(lowest) and lowest in (self.losses[0], self.losses[-1])

    @property
    def best_lr(self) -> float | None:
        """The minimum of a parabola through the best point and its neighbours, in log lr; None where all diverged."""
        if not any(map(math.isfinite, self.losses)):
            return None
        best = min(range(len(self.losses)), key=lambda index: self.losses[index])
        near = self.losses[max(0, best - 1) : best + 2]
        if len(near) < 3 or not all(map(math.isfinite, near)):
            return self.lrs[best]
        curvature = near[0] - 2 * near[1] + near[2]
        shift = 0.5 * (near[0] - near[2]) / curvature if curvature > 0 else 0.0
        x0, x1 = math.log(self.lrs[best]), math.log(self.lrs[best + (1 if shift > 0 else -1)])
        return math.exp(x0 + abs(shift) * (x1 - x0))


def drift_octaves(sweeps: Sequence[WidthSweep]) -> float:
    """By how many factors of 2 the best learning rate moves between any two widths that have one; else nan."""
    best = [math.log2(lr) for sweep in sweeps if (lr := sweep.best_lr) is not None]
    return max(best) - min(best) if len(best) > 1 else math.nan


def edge_notes(sweeps: Sequence[WidthSweep]) -> list[str]:
    """One sentence for each sweep that has no minimum inside its learning rates."""
    notes = []
    for sweep in sweeps:
        where = f"S={sweep.width_scale:g} {'with' if sweep.parametrization == 'mup' else 'without'} muP"
        if sweep.best_lr is None:
            notes.append(f"{where}: every learning rate diverged, so there is no best one; search smaller ones")
        elif sweep.at_edge:
            notes.append(
                f"{where}: the best learning rate {sweep.best_lr:.3g} is at the edge of the range {min(sweep.lrs):.3g} "
                f"to {max(sweep.lrs):.3g}, so the minimum may lie outside; widen the range of lr"
            )
    return notes


def buildable(study: Study, data: Data, width_scales: Sequence[float]) -> tuple[list[float], dict[float, str]]:
    """Which widths can be built, and why the others cannot.

    Raises:
        SurrogateError: None but the target's can.
    """
    refused = {}
    for scale in width_scales:
        try:
            study_surrogate(study, scale, data)
        except SurrogateError as error:
            refused[scale] = str(error)
    built = [scale for scale in width_scales if scale not in refused]
    if refused and set(built) <= {1}:
        reasons = "; ".join(f"S={scale:g}: {reason}" for scale, reason in refused.items())
        raise SurrogateError(f"no width to sweep can be built ({reasons}); name other width scales (--scales)")
    return built, refused


def sweep_widths(
    study: Study,
    data: Data,
    width_scales: Sequence[float],
    lrs: Sequence[float],
    *,
    num_steps: int,
    num_seeds: int = 2,
    parametrizations: Sequence[str] = ("mup", "standard"),
) -> list[WidthSweep]:
    """Train every learning rate at every width; the other hyperparameters are the middle of the study's space.

    Raises:
        SurrogateError: A width cannot be built.
    """
    params = calm_params(study)
    configurations = [{**params, "lr": lr} for lr in lrs]
    sweeps = []
    target: tuple[float, ...] | None = None
    for parametrization in parametrizations:
        make = {"mup": study_surrogate, "standard": standard_surrogate}[parametrization]
        for scale in width_scales:
            if scale == 1 and target is not None:
                means = target  # at width 1 there is nothing to parametrize
            else:
                losses = train_configurations(
                    study, data, make(study, scale, data), configurations, num_steps=num_steps, num_seeds=num_seeds
                )
                means = tuple(statistics.fmean(seeds) for seeds in losses)
            target = means if scale == 1 else target
            sweeps.append(WidthSweep(scale, parametrization, tuple(lrs), means))
    return sweeps


def train_configurations(
    study: Study,
    data: Data,
    surrogate: Surrogate,
    configurations: Sequence[Mapping[str, Any]],
    *,
    num_steps: int,
    num_seeds: int = 1,
) -> list[list[float]]:
    """Validation losses [configuration][seed] after `num_steps`; infinite where training diverged."""
    jobs = [(index, seed) for index in range(len(configurations)) for seed in range(num_seeds)]
    losses = [[math.inf] * num_seeds for _ in configurations]
    for start in range(0, len(jobs), study.max_lanes):
        batch = jobs[start : start + study.max_lanes]
        trainer = FusedTrainer(study, surrogate, data, num_steps, lambda site: None)
        for lane, (index, seed) in enumerate(batch):
            values = resolve_hyperparameters(study.optimizer, study.schedule, study.fixed, configurations[index])
            trainer.admit(lane, seed, values)
        for _ in range(num_steps):
            trainer.step()
        diverged = trainer.diverged(thorough=True)
        results = trainer.evaluate(trainer.trials)
        for lane, (index, seed) in enumerate(batch):
            loss = results[lane]["valid.loss"]
            losses[index][seed] = loss if lane not in diverged and math.isfinite(loss) else math.inf
    return losses


@dataclass(frozen=True)
class Fidelity:
    """How configurations rank on surrogate and target."""

    width_scale: float
    configurations: list[dict[str, Any]]
    surrogate_losses: list[float]
    target_losses: list[float]
    seed_noise: float
    """Standard deviation of the target's best configuration over seeds; 0 with one seed."""

    @property
    def tau(self) -> float:
        return kendall_tau(self.surrogate_losses, self.target_losses)

    def regret(self, num_verified: int) -> float:
        return regret_at(num_verified, self.surrogate_losses, self.target_losses)


def compare_configurations(
    study: Study,
    data: Data,
    surrogate: Surrogate,
    configurations: Sequence[Mapping[str, Any]],
    *,
    num_steps: int,
    num_seeds: int = 1,
    target_losses: list[list[float]] | None = None,
) -> Fidelity:
    """Train configurations on surrogate and target (or take the target's losses as given) and compare the rankings.

    Raises:
        SurrogateError: Fewer than two configurations.
    """
    if len(configurations) < 2:
        raise SurrogateError(f"got {len(configurations)} configurations, needed two or more to compare rankings")
    narrow = train_configurations(study, data, surrogate, configurations, num_steps=num_steps, num_seeds=num_seeds)
    wide = target_losses or train_configurations(
        study, data, study_surrogate(study, 1, data), configurations, num_steps=num_steps, num_seeds=num_seeds
    )
    means = [statistics.fmean(seeds) for seeds in wide]
    best = wide[min(range(len(means)), key=means.__getitem__)]
    return Fidelity(
        surrogate.width_scale,
        [dict(configuration) for configuration in configurations],
        [statistics.fmean(seeds) for seeds in narrow],
        means,
        statistics.stdev(best) if len(best) > 1 else 0.0,
    )


def draw_configurations(space: Mapping[str, BaseDistribution], number: int, seed: int) -> list[dict[str, Any]]:
    """Random configurations of a search space."""
    generator = random.Random(seed)
    return [{name: _draw(distribution, generator) for name, distribution in space.items()} for _ in range(number)]


def _draw(distribution: BaseDistribution, generator: random.Random) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return generator.choice(distribution.choices)
    low, high = getattr(distribution, "low"), getattr(distribution, "high")  # noqa: B009
    if getattr(distribution, "log", False):
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
    else:
        value = generator.uniform(low, high)
    return round(value) if isinstance(low, int) else value
