"""What a researcher writes: one `Study` at the top level of a Python file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from hydro_slurm.errors import StudyError
from hydro_slurm.model import NAME_PATTERN
from hydro_trials.hyperparameters import (
    FLAGS,
    OPTIMIZER_DEFAULTS,
    TOGETHER,
    check_complete,
    check_together,
    check_value,
    hint_at,
    known_hyperparameters,
)
from hydro_trials.schedules import SCHEDULE_DEFAULTS

if TYPE_CHECKING:
    from torch import Tensor, nn

SAMPLERS = ("tpe", "random")
PRUNERS = ("successive_halving", "median", "none")
DIRECTIONS = ("minimize", "maximize")
PRECISION_NAMES = ("full", "bf16")
DATA_ORDERS = ("shared", "per_trial")
RUNG_FACTOR = 3
"""Each rung has this many times the steps of the one before it, where only their number is given."""


def Float(low: float, high: float, *, log: bool = False, step: float | None = None) -> FloatDistribution:  # noqa: N802
    """A number between `low` and `high`; `log` searches orders of magnitude evenly."""
    return FloatDistribution(low, high, log=log, step=step)


def Int(low: int, high: int, *, log: bool = False, step: int = 1) -> IntDistribution:  # noqa: N802
    """A whole number between `low` and `high`, both included."""
    return IntDistribution(low, high, log=log, step=step)


def Categorical(choices: Sequence[bool | int | float]) -> CategoricalDistribution:  # noqa: N802
    """One of a few values."""
    return CategoricalDistribution(list(choices))


@dataclass(frozen=True, kw_only=True)
class Data:
    """Training and validation samples, each a pair (inputs, targets).

    Either is a tensor whose first dimension is the sample, or several: a dict of inputs is handed to the model by name,
    a tuple by position; targets reach the loss as they are.
    """

    train: tuple[Any, Any]
    valid: tuple[Any, Any]


@dataclass(frozen=True)
class HuggingFace:
    """A model given by its `transformers` config: nothing is downloaded, weights are drawn anew."""

    config: Any
    """A PretrainedConfig of the target."""
    model_class: Any
    """The model's class, or an Auto class such as AutoModelForCausalLM."""
    call: Callable[[Any, Tensor], Tensor] | None = None
    """`call(model, inputs)` gives the output that the study's loss takes; `model(inputs).logits` by default."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A search over optimizer hyperparameters of one model.

    Raises:
        StudyError: A field that cannot work; the message names it.
    """

    name: str
    """Becomes part of file names and job names."""
    build: Callable[[float], nn.Module] | HuggingFace | nn.Module
    """The target: `build(width)`, a function that makes the model with its hidden widths multiplied by `width` (1.0 is
    the target); or `hydro.HuggingFace(config, model_class)`; or a module, which is traced with the first samples."""
    data: Callable[[], Data]
    """Loads the data; called once per process."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """`loss(output, target)` of one model: a scalar, the mean over samples."""
    space: Mapping[str, BaseDistribution]
    """What is searched: hyperparameter name to `Float`, `Int` or `Categorical`."""
    batch_size: int
    """Samples per microbatch."""
    steps: int
    """Optimizer steps of a trial that is never pruned."""
    metrics: Mapping[str, Callable[[Tensor, Tensor], Any]] = field(default_factory=dict)
    """`metric(output, target)` over the whole validation set: a scalar."""
    objective: str = "valid.loss"
    """`valid.loss`, or `valid.NAME` of one of the metrics."""
    direction: str = "minimize"
    optimizer: str = "adam"
    """sgd, adam, rmsprop, adagrad (weight decay is part of the gradient), adamw or lion (decoupled)."""
    fixed: Mapping[str, float] = field(default_factory=dict)
    """Hyperparameters that are not searched."""
    schedule: str = "constant"
    """constant, cosine, step, multistep, exponential, onecycle or polynomial."""
    rungs: int | Sequence[int] = 4
    """Steps after which a trial is evaluated and may be pruned, the last being `steps`; or how many such rungs."""
    trials: int = 32
    max_lanes: int = 64
    """Most trials fused into one bundle; the planner stops at what brings throughput and fits."""
    width_scale: float | Literal["auto"] = 1.0
    """S: how many times narrower than the target the trials' surrogate is. "auto": the largest S up to
    `max_width_scale` that passes the coordinate check, found when the study is submitted."""
    max_width_scale: float = 8.0
    """The largest S that "auto" tries."""
    scale_decay: bool = True
    """Whether AdamW's and Lion's lr x decay stays alike at every width; False leaves the surrogate's decay alone."""
    top_k: int = 3
    """How many of the best configurations are verified on the target."""
    seed: int = 0
    accumulate: int = 1
    """Microbatches per optimizer step; their gradients are averaged."""
    precision: str = "full"
    """full, or bf16: forward and backward under autocast, parameters and optimizer state in their own type."""
    compile: bool = False
    """Try torch.compile too; kept where it measures faster even with its compile time spread over a trial's steps."""
    data_order: str = "shared"
    """shared: all trials see the samples in the same order; per_trial: each in an order of its own."""
    sampler: str = "tpe"
    pruner: str = "successive_halving"
    coordinate_check: str = "refuse"
    """What happens to a study whose surrogate fails the coordinate check: refuse or warn."""
    parameter_kinds: Mapping[str, str] = field(default_factory=dict)
    """Kinds (input, hidden, output, fixed) of parameters that `hydro_trials check` cannot tell by their shapes."""

    def __post_init__(self) -> None:
        self._check_choice("optimizer", tuple(OPTIMIZER_DEFAULTS))
        self._check_choice("schedule", tuple(SCHEDULE_DEFAULTS))
        self._check_choice("sampler", SAMPLERS)
        self._check_choice("pruner", PRUNERS)
        self._check_choice("direction", DIRECTIONS)
        self._check_choice("precision", PRECISION_NAMES)
        self._check_choice("data_order", DATA_ORDERS)
        self._check_choice("coordinate_check", ("refuse", "warn"))
        if not isinstance(self.name, str) or not NAME_PATTERN.fullmatch(self.name):
            raise StudyError(f"Study.name: got {self.name!r}, needed letters, digits, '.', '_' or '-', at most 63")
        for what in ("build", "data", "loss"):
            if not callable(getattr(self, what)) and not (what == "build" and isinstance(self.build, HuggingFace)):
                raise StudyError(f"Study.{what}: got {getattr(self, what)!r}, needed a function")
        for what in ("batch_size", "steps", "trials", "max_lanes", "accumulate", "top_k"):
            self._check_whole_number(what, 0 if what == "top_k" else 1)
        self._check_whole_number("seed", 0)
        self._check_scale("width_scale", self.width_scale, or_auto=True)
        self._check_scale("max_width_scale", self.max_width_scale, or_auto=False)
        self._check_space()
        self._check_objective()
        self.rung_steps  # noqa: B018  # raises where the rungs cannot work

    @property
    def batch_sizes(self) -> list[int]:
        """Every batch size that a trial may have, or the smallest and the largest of a range."""
        if "batch_size" in self.space:
            return sorted(round(value) for value in _extremes(self.space["batch_size"]))
        return [round(self.fixed.get("batch_size", self.batch_size))]

    @property
    def rung_steps(self) -> tuple[int, ...]:
        """Steps of every rung, rising, the last one the whole budget."""
        if isinstance(self.rungs, int) and not isinstance(self.rungs, bool):
            if self.rungs < 1:
                raise StudyError(f"Study.rungs: got {self.rungs}, needed 1 or more")
            steps = {max(1, round(self.steps / RUNG_FACTOR**index)) for index in range(self.rungs)}
            return tuple(sorted(steps))
        rungs = tuple(self.rungs) if isinstance(self.rungs, Sequence) else ()
        if (
            not rungs
            or not all(isinstance(rung, int) and rung > 0 for rung in rungs)
            or list(rungs) != sorted(set(rungs))
            or rungs[-1] != self.steps
        ):
            raise StudyError(
                f"Study.rungs: got {self.rungs!r}, needed a number of rungs, or rising steps that end with "
                f"steps={self.steps}"
            )
        return rungs

    def _check_choice(self, what: str, choices: tuple[str, ...]) -> None:
        if getattr(self, what) not in choices:
            raise StudyError(f"Study.{what}: got {getattr(self, what)!r}, needed one of {', '.join(choices)}")

    def _check_whole_number(self, what: str, lowest: int) -> None:
        value = getattr(self, what)
        if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
            raise StudyError(f"Study.{what}: got {value!r}, needed a whole number of {lowest} or more")

    def _check_scale(self, what: str, value: Any, *, or_auto: bool) -> None:
        if or_auto and value == "auto":
            return
        if not isinstance(value, (int, float)) or not 1 <= value < math.inf:
            wanted = 'a number of 1 or more, or "auto"' if or_auto else "a number of 1 or more"
            raise StudyError(f"Study.{what}: got {value!r}, needed {wanted}")

    def _check_space(self) -> None:
        known = known_hyperparameters(self.optimizer, self.schedule)
        if not isinstance(self.space, Mapping) or not self.space:
            raise StudyError("Study.space: got nothing to search, needed at least one hyperparameter with its range")
        for name, distribution in self.space.items():
            self._check_known(f"space[{name!r}]", name, known)
            if name in self.fixed:
                raise StudyError(f"Study.space and Study.fixed both name {name!r}: remove one of them")
            if not isinstance(distribution, BaseDistribution):
                raise StudyError(f"Study.space[{name!r}]: got {distribution!r}, needed Float, Int or Categorical")
            if name in FLAGS and isinstance(distribution, FloatDistribution):
                raise StudyError(
                    f"Study.space[{name!r}]: got Float, needed Categorical([False, True]): it is on or off"
                )
            if name == "batch_size" and isinstance(distribution, FloatDistribution):
                raise StudyError("Study.space['batch_size']: got Float, needed Int or Categorical")
            for value in _extremes(distribution):
                check_value(name, value, self.schedule)
        for name, value in self.fixed.items():
            self._check_known(f"fixed[{name!r}]", name, known)
            check_value(name, value, self.schedule)
        check_complete({*self.space, *self.fixed}, self.schedule)
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Refuse a study none of whose trials could have hyperparameters that go together; one trial in some cannot."""
        choices = {name: [value] for name, value in {**OPTIMIZER_DEFAULTS[self.optimizer], **self.fixed}.items()}
        choices |= {name: _extremes(distribution) for name, distribution in self.space.items()}
        together = {name: choices[name] for name in TOGETHER if name in choices}
        refusal: StudyError | None = None
        for values in itertools.product(*together.values()):
            try:
                check_together(dict(zip(together, values, strict=True)))
            except StudyError as error:
                refusal = error
            else:
                return
        if refusal is not None:
            raise refusal

    def _check_known(self, where: str, name: str, known: Sequence[str]) -> None:
        if name not in known:
            raise StudyError(
                f"Study.{where}: unknown; optimizer {self.optimizer!r} with schedule {self.schedule!r} knows "
                f"{', '.join(known)}{hint_at(name, self.schedule)}"
            )

    def _check_objective(self) -> None:
        choices = ["valid.loss", *(f"valid.{name}" for name in self.metrics)]
        if "loss" in self.metrics:
            raise StudyError("Study.metrics: 'loss' is the study's loss already; give the metric another name")
        if self.objective not in choices:
            raise StudyError(f"Study.objective: got {self.objective!r}, needed one of {', '.join(choices)}")


def _extremes(distribution: BaseDistribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    return [getattr(distribution, "low", 0), getattr(distribution, "high", 0)]
