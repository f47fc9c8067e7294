"""Does a surrogate train alike at every width? The size of each module's change must not depend on it.

A model is trained for a few steps at several widths, each parametrized as the surrogate of the widest. For every module
are measured: the mean absolute size of its output before training, the mean absolute change of its output after each
step, on a fixed batch, and the slope of both over width on log-log axes. What no module puts out but one takes in
counts too (a residual stream), and so do attention scores: a wrong scale of theirs hides behind the softmax.

Source: Yang et al., Tensor Programs V (2022), appendix D.1.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hydro_slurm.errors import SurrogateError
from hydro_trials.fusion.trainer import FusedTrainer
from hydro_trials.hyperparameters import known_hyperparameters, resolve_hyperparameters
from hydro_trials.samples import first
from hydro_trials.schedules import SCHEDULE_DEFAULTS
from hydro_trials.study import Categorical, Data, Study
from hydro_trials.surrogate.outputs import OWN, SCORES, OutputRecorder
from hydro_trials.surrogate.surrogate import Surrogate, study_surrogate

CONSTANT = "constant"
"""The schedule of the check: in the first steps of a warm-up no factor shows."""
MAX_GROWTH = 0.3
MAX_DECLINE = 0.6
"""A wrong factor of S shows as a slope of 1; finite widths alone bend slopes down by up to about 0.3."""
MAX_FREE_DECLINE = 1.2
"""Of readouts, which start with a slope of -0.5 (their own weights are held to the strict limit), and of the scores of
heads that shrink."""
MAX_INITIAL_SLOPE = 0.3
MIN_READOUT_SLOPE = -0.8
"""Of a readout at the start: its random weights make it -0.5."""
MAX_HEAD_SLOPE = -0.25
"""Of the scores at the start where heads shrink, over the head size, since a surrogate may have fewer heads first and
smaller ones only in its last factor: they are sums of random terms over d, hence -0.5 with 1/d and 0 with
1/sqrt(d). (Their first changes tell less: under SGD they fall with 1/d, and stay with 1/sqrt(d).)"""
MAX_MEDIAN_SLOPE = 0.35
NUM_ERRORS = 2.0
"""A slope counts as far from 0 as it is by this many standard errors less."""
MAX_RELATIVE_CHANGE = 0.1
MAX_CALIBRATIONS = 6
"""The learning rate is divided by 4 until the typical module changes by no more than this: a training that swings says
nothing about factors."""
MIN_RELATIVE_CHANGE = 1e-6
"""Smaller changes are rounding."""
MIN_TYPICAL_CHANGE = 1e-4
"""The learning rate is multiplied by 16, as often at most, until the typical module that changes at all changes by as
much: what hardly moves says nothing either."""


@dataclass(frozen=True)
class Slope:
    """Slope of log size over log width, with its standard error over seeds; 0 means that width does not matter."""

    value: float
    error: float

    @property
    def least(self) -> float:
        """The slope closest to 0 that the errors allow."""
        return math.copysign(max(0.0, abs(self.value) - NUM_ERRORS * self.error), self.value)


@dataclass(frozen=True)
class CoordinateCheck:
    """What was measured. Keys are module names, in the order of the forward pass; lists run over steps 1, 2, …"""

    width_scales: tuple[float, ...]
    changes: dict[str, list[list[float]]]
    """Mean absolute change of the output since step 0: one list over width scales per step."""
    slopes: dict[str, list[Slope]]
    initial: dict[str, Slope]
    """Of the output's size before the first step; of the scores of shrinking heads over the head size."""
    readouts: frozenset[str] = frozenset()
    """Modules whose output at the start is known to fall with width."""
    shrinking_heads: frozenset[str] = frozenset()
    """Attention scores of heads whose size follows width."""
    num_steps: int = 0
    failures: tuple[str, ...] = field(default=())
    """Widths at which training broke down."""
    lr: float = math.nan
    """The learning rate of the steps."""
    typical_change: float = math.inf
    """At the narrowest width, of the modules that change at all: the median share of its size by which one has changed
    after the last step."""

    @property
    def problems(self) -> list[str]:
        """Why the parametrization is to be distrusted, the likely cause first; empty where it is sound."""
        found = [(-1, 0, f"training is not finite at {failure}") for failure in self.failures]
        if self.typical_change < MIN_TYPICAL_CHANGE:
            text = (
                f"hardly anything is learned in {self.num_steps} steps at lr {self.lr:.3g}, so nothing can be compared"
            )
            found.append((-1, 1, f"{text}: search larger learning rates, or see that gradients reach the parameters"))
        for position, name in enumerate(self.initial):
            problem = self._initial_problem(name)
            if problem:
                found.append((0, position, f"module {name}: {problem}"))
        for position, (name, slopes) in enumerate(self.slopes.items()):
            lowest = -MAX_FREE_DECLINE if name in self.readouts | self.shrinking_heads else -MAX_DECLINE
            for step, slope in enumerate(slopes, 1):
                if not lowest <= slope.least <= MAX_GROWTH:
                    kind, limit = ("grows", MAX_GROWTH) if slope.value > 0 else ("shrinks", lowest)
                    text = f"its change {kind} with width, slope {slope.value:+.2f} at step {step} (limit {limit:+g})"
                    found.append((step, position, f"module {name}: {text}"))
                    break
        late = [abs(slopes[-1].least) for slopes in self.slopes.values() if slopes]
        if late and statistics.median(late) > MAX_MEDIAN_SLOPE:
            median = statistics.median(late)
            text = f"the median |slope| is {median:.2f}, over {MAX_MEDIAN_SLOPE}: layers may be too narrow"
            found.append((self.num_steps + 1, 0, text))
        return [text for _, _, text in sorted(found)]

    def _initial_problem(self, name: str) -> str | None:
        slope = self.initial[name]
        if name in self.shrinking_heads:
            if slope.value - NUM_ERRORS * slope.error <= MAX_HEAD_SLOPE:
                return None
            return (
                "the head size follows width, and scores are divided by its square root (slope over it "
                f"{slope.value:+.2f} at the start); divide by the size itself, sqrt(d_target) / d, or shrink the "
                "number of heads"
            )
        lowest = MIN_READOUT_SLOPE if name in self.readouts else -MAX_INITIAL_SLOPE
        if name.endswith((f"({SCORES})", f"({OWN})")) or lowest <= slope.least <= MAX_INITIAL_SLOPE:
            return None
        return f"its size depends on width at the start, slope {slope.value:+.2f}"


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
    """Train the study's model at each width and compare, at a constant learning rate: in a warm-up nothing moves.

    Args:
        study: Gives model, loss and optimizer.
        data: Its data; the first validation samples are what outputs are compared on.
        params: Hyperparameters of all lanes; the learning rate is lowered where the model would swing, and raised where
            it would not move.
        width_scales: At least three values of S.
        num_steps: Optimizer steps.
        num_seeds: Initialisations to average over; they are lanes of one bundle.
        shrink: Makes the surrogate of a width scale; the study's own by default.

    Raises:
        SurrogateError: Fewer than three width scales, or the model cannot be shrunk by one of them.
    """
    if len(set(width_scales)) < 3:
        raise SurrogateError(f"got width scales {list(width_scales)}, needed at least three different ones")
    shrink = shrink or (lambda scale: study_surrogate(study, scale, data, redraw=True))
    values = resolve_hyperparameters(study.optimizer, study.schedule, study.fixed, params)
    study, values = _at_constant_lr(study, values)
    surrogates = [shrink(scale) for scale in width_scales]
    narrowest = max(range(len(width_scales)), key=lambda index: width_scales[index])
    readouts = surrogates[narrowest].classification.readouts  # the target itself has no factors, hence knows of none

    def measure(index: int, values: dict[str, float]) -> _Measured:
        return _measure(study, data, surrogates[index], readouts, values, num_steps, num_seeds)

    measured = {narrowest: measure(narrowest, values)}
    for _ in range(MAX_CALIBRATIONS):
        if measured[narrowest].relative_change <= MAX_RELATIVE_CHANGE:
            break
        values = {**values, "lr": values["lr"] / 4}
        measured[narrowest] = measure(narrowest, values)
    for _ in range(MAX_CALIBRATIONS):
        if measured[narrowest].typical_change >= MIN_TYPICAL_CHANGE:
            break
        values = {**values, "lr": values["lr"] * 16}
        measured[narrowest] = measure(narrowest, values)
    for index in range(len(surrogates)):
        if index != narrowest:
            measured[index] = measure(index, values)
    sizes = [measured[index].sizes for index in range(len(surrogates))]
    failures = tuple(f"S={scale:g}" for index, scale in enumerate(width_scales) if not measured[index].finite)
    head_sizes = {
        name: [measured[index].head_sizes[name] for index in range(len(surrogates))]
        for name in measured[narrowest].head_sizes
        if all(name in measured[index].head_sizes for index in range(len(surrogates)))
    }
    shrinking = frozenset(name for name, found in head_sizes.items() if len(set(found)) > 1)
    widths = [1 / scale for scale in width_scales]
    changes, slopes, initial = {}, {}, {}
    for name in sizes[0]:
        by_step = [[each[name][step] for each in sizes] for step in range(num_steps + 1)]
        reference = [statistics.fmean(seeds) for seeds in by_step[0]]
        changes[name] = [[statistics.fmean(seeds) for seeds in step] for step in by_step[1:]]
        slopes[name] = [_slope(widths, step, reference) for step in by_step[1:]]
        initial[name] = _slope(head_sizes[name] if name in shrinking else widths, by_step[0], None)
    return CoordinateCheck(
        width_scales=tuple(width_scales),
        changes=changes,
        slopes=slopes,
        initial=initial,
        readouts=measured[narrowest].readouts,
        shrinking_heads=shrinking,
        num_steps=num_steps,
        failures=failures,
        lr=values["lr"],
        typical_change=measured[narrowest].typical_change,
    )


def _at_constant_lr(study: Study, values: dict[str, float]) -> tuple[Study, dict[str, float]]:
    """The study on a schedule that does nothing, and hyperparameters that fit it."""
    known = set(known_hyperparameters(study.optimizer, CONSTANT)) - {"warmup_steps"}
    constant = dataclasses.replace(
        study,
        schedule=CONSTANT,
        space={name: each for name, each in study.space.items() if name in known} | {"lr": Categorical([values["lr"]])},
        fixed={name: value for name, value in study.fixed.items() if name in known - {"lr"}},
    )
    return constant, {name: value for name, value in values.items() if name in known} | SCHEDULE_DEFAULTS[CONSTANT]


@dataclass(frozen=True)
class _Measured:
    """Of one width: output sizes before the first step, then changes, as [step][seed] by module."""

    sizes: dict[str, list[list[float]]]
    readouts: frozenset[str]
    head_sizes: dict[str, int]
    finite: bool

    @property
    def relative_change(self) -> float:
        """The median module's change in the last step, over its size before the first."""
        if not self.finite:
            return math.inf
        shares = self._shares()
        return statistics.median([share for name, share in shares.items() if name not in self.readouts] or [0.0])

    @property
    def typical_change(self) -> float:
        """The same of the modules that change at all, readouts included: frozen ones say nothing."""
        if not self.finite:
            return math.inf
        return statistics.median([share for share in self._shares().values() if share > 0] or [0.0])

    def _shares(self) -> dict[str, float]:
        starts = {name: statistics.fmean(steps[0]) for name, steps in self.sizes.items()}
        return {name: statistics.fmean(self.sizes[name][-1]) / start for name, start in starts.items() if start > 0}


def _measure(
    study: Study,
    data: Data,
    surrogate: Surrogate,
    readouts: tuple[str, ...],
    values: dict[str, float],
    num_steps: int,
    num_seeds: int,
) -> _Measured:
    apart = dataclasses.replace(study, data_order="per_trial")  # seeds that share their samples are no average
    trainer = FusedTrainer(apart, surrogate, data, study.steps, lambda site: None)
    for seed in range(num_seeds):
        trainer.admit(seed, seed, values)
    recorder = OutputRecorder(surrogate.make(0), readouts)
    x_B = first(data.valid[0], study.batch_size)
    states = [trainer.state(seed) for seed in range(num_seeds)]
    before, inputs = [], []
    for state in states:
        before.append(recorder.outputs(state, x_B))
        inputs.append(recorder.readout_inputs)
    sizes = {name: [[recorder.size(lane[name]) for lane in before]] for name in before[0]}
    for name in readouts:
        sizes[f"{name} ({OWN})"] = [sizes[name][0]]
    for _ in range(num_steps):
        trainer.step()
        changes = []
        for seed, state in enumerate(states):
            now = trainer.state(seed)
            after = recorder.outputs(now, x_B)
            change = {name: after[name] - output for name, output in before[seed].items()}
            own = recorder.own_changes(state, now, inputs[seed])
            changes.append(change | {f"{name} ({OWN})": output for name, output in own.items()})
        for name, steps in sizes.items():
            steps.append([recorder.size(lane[name]) for lane in changes])
    return _Measured(sizes, frozenset(recorder.readouts), recorder.head_sizes, not trainer.diverged(thorough=True))


def _slope(widths: Sequence[float], sizes: Sequence[Sequence[float]], reference: Sequence[float] | None) -> Slope:
    """Least-squares slope of log size over log width; sizes by width and seed."""
    means = [statistics.fmean(seeds) for seeds in sizes]
    if not all(map(math.isfinite, means)):
        return Slope(math.inf, 0.0)
    floor = [0.0] * len(means) if reference is None else [MIN_RELATIVE_CHANGE * size for size in reference]
    if any(mean <= least for mean, least in zip(means, floor, strict=True)):
        return Slope(0.0, 0.0)
    logs = [math.log(width) for width in widths]
    value = statistics.linear_regression(logs, [math.log(mean) for mean in means]).slope
    by_seed = [
        statistics.linear_regression(logs, [math.log(size) for size in seed]).slope
        for seed in zip(*sizes, strict=True)
        if min(seed) > 0
    ]
    error = statistics.stdev(by_seed) / math.sqrt(len(by_seed)) if len(by_seed) > 1 else 0.0
    return Slope(value, error)
