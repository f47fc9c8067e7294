"""Do hyperparameters of a surrogate hold for its target, and what does that save?

Learning rates over width with muP and without; which rule hidden weights under SGD should get; how 30 configurations
rank on surrogate and target; and the compute of a whole search on a surrogate against searches on the target itself.
About 35 minutes on two cores; with QUICK=1 in the environment about 5, with fewer of everything.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import torch
from harness import Claim, bootstrap_ci, write_claims
from torch import nn
from transfer_nets import Transformer, cnn, digits_data, mlp, text_data, token_loss

import hydro_trials as hydro
from hydro_trials.fusion import FusedTrainer
from hydro_trials.hyperparameters import resolve_hyperparameters
from hydro_trials.surrogate import Surrogate, make_surrogate, study_surrogate
from hydro_trials.surrogate.coordinate_check import check_coordinates
from hydro_trials.surrogate.scale import check_scale
from hydro_trials.surrogate.sweep import (
    WidthSweep,
    compare_configurations,
    draw_configurations,
    drift_octaves,
    sweep_widths,
    train_configurations,
)

QUICK = os.environ.get("QUICK") == "1"
NUM_LRS = 7 if QUICK else 11
NUM_SEEDS = 1 if QUICK else 2
NUM_CONFIGURATIONS = 30
NUM_SEARCHED = 24 if QUICK else 128
NUM_REPLAYS = 200


def study_of(name: str, build: Callable[[float], nn.Module], data: hydro.Data, **fields: Any) -> hydro.Study:
    """A study with this benchmark's usual settings."""
    defaults: dict[str, Any] = {
        "loss": nn.functional.cross_entropy,
        "space": {"lr": hydro.Float(1e-2, 4.0, log=True)},
        "optimizer": "sgd",
        "batch_size": 32,
        "steps": 100 if QUICK else 300,
        "max_lanes": 11,
    }
    return hydro.Study(name=name, build=build, data=lambda: data, **{**defaults, **fields})


def model_studies() -> dict[str, tuple[hydro.Study, hydro.Data, tuple[float, ...]]]:
    """The models whose learning rate is swept, with the width scales (the widest is the target, S = 1)."""
    text, num_symbols = text_data()
    flat, images = digits_data(), digits_data(images=True)
    widest = {"transformer": 64 if QUICK else 128, "mlp": 256 if QUICK else 512, "cnn": 64 if QUICK else 128}

    def transformer(width: float) -> nn.Module:
        size = round(widest["transformer"] * width)
        return Transformer(size, size // 8, num_symbols)

    adam = {
        "loss": token_loss,
        "optimizer": "adam",
        "steps": 60 if QUICK else 150,
        "space": {"lr": hydro.Float(2.5e-4, 0.25, log=True)},
    }
    studies = {
        "transformer": study_of("transformer", transformer, text, **adam, batch_size=16),
        "mlp": study_of("mlp", lambda width: mlp(round(widest["mlp"] * width)), flat),
        "cnn": study_of("cnn", lambda width: cnn(round(widest["cnn"] * width)), images, batch_size=16),
    }
    return {
        "transformer": (studies["transformer"], text, (1, 2, 4, 8)),
        "mlp": (studies["mlp"], flat, (1, 2, 4, 8, 16)),
        "cnn": (studies["cnn"], images, (1, 2, 4, 8) if QUICK else (1, 2, 4, 8, 16)),
    }


def learning_rates(study: hydro.Study) -> list[float]:
    low, high = (getattr(study.space["lr"], bound) for bound in ("low", "high"))
    return [low * (high / low) ** (index / (NUM_LRS - 1)) for index in range(NUM_LRS)]


def measure_octaves(model: str) -> list[Claim]:
    """Drift of the best learning rate over widths, with muP and without."""
    study, data, scales = prepare(model)
    sweeps = sweep_widths(study, data, scales, learning_rates(study), num_steps=study.steps, num_seeds=NUM_SEEDS)
    claims = []
    for kind, goal in (("mup", 1.0), ("standard", None)):
        of_kind = [sweep for sweep in sweeps if sweep.parametrization == kind]
        print_sweeps(model, kind, of_kind)
        better = "lower" if kind == "mup" else "higher"
        drift = drift_octaves(of_kind)
        claims.append(Claim(f"octaves.{kind}.{model}", drift, "octaves", goal, better, None, len(of_kind) * NUM_SEEDS))
    return claims


def measure_sgd_rule(model: str) -> list[Claim]:
    """Regret of taking the learning rate from a surrogate, and the coordinate check, under either rule for SGD."""
    study, data, scales = prepare(model)
    configurations = [{"lr": lr} for lr in learning_rates(study)]

    def losses(surrogate: Surrogate) -> list[list[float]]:
        return train_configurations(study, data, surrogate, configurations, num_steps=study.steps, num_seeds=NUM_SEEDS)

    target = [statistics.fmean(seeds) for seeds in losses(study_surrogate(study, 1, data))]
    claims = []
    for rule in ("mup", "times_s"):

        def shrink(scale: float, rule: str = rule) -> Surrogate:
            return make_surrogate(study.build, scale, "sgd", sgd_rule=rule)

        regrets = []
        for scale in scales[1:]:
            by_seed = list(zip(*losses(shrink(scale)), strict=True))
            best = [min(range(len(seed)), key=seed.__getitem__) for seed in by_seed]
            regrets += [target[index] - min(target) for index in best]
        name = f"sgd_rule.{rule}.{model}"
        interval = bootstrap_ci(regrets, statistics.fmean)
        claims.append(Claim(f"{name}.regret", statistics.fmean(regrets), "loss", None, "lower", interval, len(regrets)))
        check = check_coordinates(study, data, {"lr": 1e-2}, scales, num_steps=3, shrink=shrink)
        steepest = max(abs(slope.value) for slopes in check.slopes.values() for slope in slopes)
        claims.append(Claim(f"{name}.steepest_slope", steepest, "slope", None, "lower", None, len(check.slopes)))
        claims.append(Claim(f"{name}.problems", float(len(check.problems)), "modules", 0.0, "lower", None, 1))
    return claims


def measure_fidelity() -> list[Claim]:
    """How 30 configurations of lr, momentum, batch size and gamma rank on surrogates and target."""
    data = digits_data()
    size = 256 if QUICK else 512
    space = {
        "lr": hydro.Float(1e-3, 1.0, log=True),
        "momentum": hydro.Float(0.5, 0.95),
        "gamma": hydro.Float(0.01, 0.9),
    }
    study = study_of("configurations", lambda width: mlp(round(size * width)), data, space=space, schedule="step")
    batch_sizes = (16, 32, 64)
    per_size = NUM_CONFIGURATIONS // len(batch_sizes)
    seeds = max(2, NUM_SEEDS)
    claims = []
    known: dict[int, list[list[float]]] = {}
    for scale in (8, 4):
        narrow: list[float] = []
        wide: list[list[float]] = []
        for batch_size in batch_sizes:
            of_size = dataclasses.replace(study, batch_size=batch_size)
            drawn = draw_configurations(space, per_size, batch_size)
            surrogate = study_surrogate(of_size, scale, data)
            if batch_size not in known:
                target = study_surrogate(of_size, 1, data)
                known[batch_size] = train_configurations(
                    of_size, data, target, drawn, num_steps=study.steps, num_seeds=seeds
                )
            found = compare_configurations(
                of_size, data, surrogate, drawn, num_steps=study.steps, num_seeds=seeds, target_losses=known[batch_size]
            )
            narrow += found.surrogate_losses
            wide += known[batch_size]
        claims += fidelity_claims(scale, narrow, wide)
    return claims


def fidelity_claims(scale: int, narrow: Sequence[float], wide: Sequence[Sequence[float]]) -> list[Claim]:
    from hydro_trials.surrogate.fidelity import kendall_tau, regret_at

    means = [statistics.fmean(seeds) for seeds in wide]
    pairs = list(zip(narrow, means, strict=True))
    generator = random.Random(0)
    resampled = sorted(kendall_tau(*zip(*generator.choices(pairs, k=len(pairs)), strict=True)) for _ in range(400))
    interval = (resampled[10], resampled[389])
    best = wide[min(range(len(means)), key=means.__getitem__)]
    regret = regret_at(3, narrow, means)
    return [
        Claim(f"kendall.s{scale}", kendall_tau(narrow, means), "tau", 0.8, "higher", interval, len(pairs)),
        Claim(f"regret_at_3.s{scale}", regret, "loss", 0.0, "lower", None, len(pairs)),
        Claim(f"regret_at_3.s{scale}.seed_noise", statistics.stdev(best), "loss", None, "lower", None, len(best)),
    ]


def measure_compute() -> list[Claim]:
    """CPU seconds of a search on a surrogate, everything counted, against searches on the target."""
    data = digits_data()
    size, scale = (256, 8) if QUICK else (1024, 8)
    space = {
        "lr": hydro.Float(1e-4, 10.0, log=True),
        "momentum": hydro.Float(0.0, 0.99),
        "gamma": hydro.Float(0.01, 0.9),
    }
    study = study_of("search", lambda width: mlp(round(size * width)), data, space=space, schedule="step", max_lanes=16)
    configurations = draw_configurations(space, NUM_SEARCHED, 5)

    began_s = time.process_time()
    surrogate = study_surrogate(study, scale, data)
    check = check_scale(study, data, surrogate)
    fusion_counts = (1, 16)  # profiling, as the planner does before it fuses
    for lanes in fusion_counts:
        train_configurations(study, data, surrogate, configurations[:lanes], num_steps=5)
    narrow = [seeds[0] for seeds in train_configurations(study, data, surrogate, configurations, num_steps=study.steps)]
    order = sorted(range(len(narrow)), key=narrow.__getitem__)
    search_s = time.process_time() - began_s

    records = [train_on_target(study, data, configuration) for configuration in configurations]
    verified = order[:3]
    ours_s = search_s + sum(records[index].seconds[-1] for index in verified)
    quality = min(records[index].losses[-1] for index in verified)
    pruners = {"random": optuna.pruners.NopPruner(), "asha": optuna.pruners.SuccessiveHalvingPruner(reduction_factor=3)}
    claims = []
    saved: dict[str, float] = {}
    for name, pruner in pruners.items():
        ratios = [replay(records, quality, seed, pruner) / ours_s for seed in range(NUM_REPLAYS)]
        saved[name] = statistics.median(ratios)
        interval = bootstrap_ci(ratios)
        claims.append(Claim(f"compute_saved.{name}", saved[name], "x", 10.0, "higher", interval, len(ratios)))
    best = min(saved, key=saved.__getitem__)
    claims.insert(0, dataclasses.replace(next(c for c in claims if c.name.endswith(best)), name="compute_saved"))
    for name, pruner in pruners.items():
        within = [best_within(records, ours_s, seed, pruner) - quality for seed in range(NUM_REPLAYS)]
        interval = bootstrap_ci(within)
        claims.append(
            Claim(
                f"worse_at_our_compute.{name}", statistics.median(within), "loss", 0.0, "higher", interval, NUM_REPLAYS
            )
        )
    full = min(record.losses[-1] for record in records)
    claims.append(Claim("compute_saved.regret", quality - full, "loss", 0.0, "lower", None, len(records)))
    claims.append(Claim("compute_saved.ours_s", ours_s, "s", None, "lower", None, 1))
    claims.append(Claim("compute_saved.problems", float(len(check.problems)), "modules", 0.0, "lower", None, 1))
    return claims


@dataclasses.dataclass(frozen=True)
class TargetRecord:
    """One configuration trained on the target: CPU seconds and losses up to each rung."""

    rungs: tuple[int, ...]
    seconds: tuple[float, ...]
    losses: tuple[float, ...]


def train_on_target(study: hydro.Study, data: hydro.Data, configuration: dict[str, Any]) -> TargetRecord:
    rungs = tuple(sorted({max(1, study.steps // 9), max(1, study.steps // 3), study.steps}))
    trainer = FusedTrainer(study, study_surrogate(study, 1, data), data, study.steps, lambda site: None)
    trainer.admit(0, 0, resolve_hyperparameters(study.optimizer, study.schedule, study.fixed, configuration))
    began_s = time.process_time()
    seconds, losses = [], []
    for step in range(1, study.steps + 1):
        trainer.step()
        if step in rungs:
            loss = trainer.evaluate([0])[0]["valid.loss"]
            losses.append(loss if math.isfinite(loss) else 1e9)
            seconds.append(time.process_time() - began_s)
    return TargetRecord(rungs, tuple(seconds), tuple(losses))


def replay(records: Sequence[TargetRecord], quality: float, seed: int, pruner: optuna.pruners.BasePruner) -> float:
    """CPU seconds until a search over the same configurations, in random order, has reached a quality.

    The seconds of all of them where pruning has thrown away what would have reached it.
    """
    total_s = 0.0
    for seconds, loss in searching(records, seed, pruner):
        total_s += seconds
        if loss <= quality:
            break
    return total_s


def best_within(records: Sequence[TargetRecord], limit_s: float, seed: int, pruner: optuna.pruners.BasePruner) -> float:
    """The best loss that such a search has after so many CPU seconds; the trial that begins before them counts."""
    best, total_s = math.inf, 0.0
    for seconds, loss in searching(records, seed, pruner):
        best = min(best, loss)
        total_s += seconds
        if total_s >= limit_s:
            break
    return best if math.isfinite(best) else max(record.losses[-1] for record in records)


def searching(
    records: Sequence[TargetRecord], seed: int, pruner: optuna.pruners.BasePruner
) -> Iterator[tuple[float, float]]:
    """CPU seconds and final loss (infinite if pruned) of one trial after the other."""
    search = optuna.create_study(pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=seed))
    order = list(records)
    random.Random(seed).shuffle(order)
    for record in order:
        trial = search.ask()
        for rung, seconds, loss in zip(record.rungs, record.seconds, record.losses, strict=True):
            trial.report(loss, rung)
            if rung != record.rungs[-1] and trial.should_prune():
                search.tell(trial, state=optuna.trial.TrialState.PRUNED)
                yield seconds, math.inf
                break
        else:
            search.tell(trial, record.losses[-1])
            yield record.seconds[-1], record.losses[-1]


def prepare(model: str) -> tuple[hydro.Study, hydro.Data, tuple[float, ...]]:
    return model_studies()[model]


def print_sweeps(model: str, kind: str, sweeps: Sequence[WidthSweep]) -> None:
    for sweep in sweeps:
        losses = " ".join(f"{loss:.3g}" for loss in sweep.losses)
        best = "none" if sweep.best_lr is None else f"{sweep.best_lr:.3g}"
        print(f"{model} {kind} S={sweep.width_scale:g}: best lr {best}, losses {losses}", flush=True)


JOBS: list[tuple[Callable[..., list[Claim]], tuple[str, ...]]] = [
    (measure_octaves, ("transformer",)),
    (measure_compute, ()),
    (measure_octaves, ("cnn",)),
    (measure_sgd_rule, ("cnn",)),
    (measure_octaves, ("mlp",)),
    (measure_sgd_rule, ("mlp",)),
    (measure_fidelity, ()),
]


def start_worker() -> None:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore")


def main() -> None:
    """Measure on as many cores as asked for, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/bench/transfer.json"))
    parser.add_argument("--workers", type=int, default=min(2, len(os.sched_getaffinity(0))), help="processes")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.workers, initializer=start_worker) as pool:
        waiting = [pool.submit(job, *given) for job, given in JOBS]
        claims = [claim for each in waiting for claim in each.result()]
    write_claims(arguments.output, claims)


if __name__ == "__main__":
    main()
