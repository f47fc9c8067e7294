"""The surrogate of a model: its narrow version, initialised and parametrized so that hyperparameters carry over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hydro_slurm.errors import HydroError, SurrogateError
from hydro_trials.study_file import describe_error
from hydro_trials.surrogate.classify import Classification, classify
from hydro_trials.surrogate.rules import ParamRule, param_rules

REFERENCE_SEED = 20_221
"""Init statistics are measured from this seed on, so that every process and lane uses the same ones."""


@dataclass(frozen=True)
class InitScale:
    """How a narrow model's own draw becomes the surrogate's: (draw - center) * factor + offset."""

    center: float
    factor: float
    offset: float


@dataclass(frozen=True)
class Surrogate:
    """What it takes to train a model at width 1 / S. With S = 1 it is the target itself, every factor 1."""

    build: Callable[[float], nn.Module]
    width_scale: float
    classification: Classification
    rules: dict[str, ParamRule]
    init_scales: dict[str, InitScale]

    def make(self, seed: int) -> nn.Module:
        """A new surrogate, its parameters drawn from `seed` alone."""
        module = build_seeded(self.build, 1 / self.width_scale, seed)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                scale = self.init_scales.get(name)
                if scale is not None:
                    parameter.sub_(scale.center).mul_(scale.factor).add_(scale.offset)
        if self.width_scale != 1:
            for name in self.classification.readouts:
                module.get_submodule(name).register_forward_pre_hook(_ScaleInput(self.width_scale))
        return module


class _ScaleInput:
    """Forward pre-hook of a readout: multiplies its input."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.num_calls = 0

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.num_calls += 1
        return (args[0] * self.factor, *args[1:])


def make_surrogate(
    build: Callable[[float], nn.Module],
    width_scale: float,
    optimizer: str,
    *,
    parameter_kinds: Mapping[str, str] | None = None,
) -> Surrogate:
    """Shrink a model by `width_scale` and work out what every parameter gets.

    Raises:
        SurrogateError: The model does not build, cannot be shrunk by that much, or a parameter has no known rule.
    """
    target = build_seeded(build, 1.0, REFERENCE_SEED)
    if width_scale == 1:
        classification = classify(target, target, 1.0)
        return Surrogate(build, 1.0, classification, param_rules(classification.kinds, 1.0, optimizer), {})
    narrow = build_seeded(build, 1 / width_scale, REFERENCE_SEED)
    classification = classify(target, narrow, width_scale, parameter_kinds)
    if all(kind == "fixed" for kind in classification.kinds.values()):
        raise SurrogateError(
            f"no parameter changes between width 1 and 1/{width_scale:g}: build(width) does not use its argument; "
            "multiply the hidden widths by it, or set width_scale to 1"
        )
    rules = param_rules(classification.kinds, width_scale, optimizer)
    return Surrogate(build, width_scale, classification, rules, _measure_init(build, target, width_scale, rules))


def check_readouts(surrogate: Surrogate, module: nn.Module) -> None:
    """After a forward pass of `module`: every readout must have been called as a module.

    Raises:
        SurrogateError: One was not (its weight is used directly), so its input went unscaled.
    """
    for name in surrogate.classification.readouts if surrogate.width_scale != 1 else ():
        hooks = module.get_submodule(name)._forward_pre_hooks.values()
        if not any(isinstance(hook, _ScaleInput) and hook.num_calls for hook in hooks):
            raise SurrogateError(
                f"module {name} is a readout, but the model's forward does not call it (it uses the weight directly): "
                "call the module, so that its input can be scaled"
            )


def build_seeded(build: Callable[[float], nn.Module], width: float, seed: int) -> nn.Module:
    """Call a model factory with the CPU generator set to `seed`, and leave the generator as it was.

    Raises:
        SurrogateError: It raises, or returns no module.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            module = build(width)
        except HydroError:
            raise
        except Exception as error:
            raise SurrogateError(f"build({width:g}) failed: {describe_error(error)}") from error
    if not isinstance(module, nn.Module):
        raise SurrogateError(f"build({width:g}) returned {type(module).__name__}, needed a torch.nn.Module")
    return module


@dataclass
class _Statistics:
    """Running moments of all values of one parameter, over several builds."""

    num: int = 0
    total: float = 0.0
    total_squared: float = 0.0

    def add(self, values: Tensor) -> None:
        values = values.detach().double()
        self.num += values.numel()
        self.total += float(values.sum())
        self.total_squared += float(values.square().sum())

    @property
    def mean(self) -> float:
        return self.total / max(1, self.num)

    @property
    def std(self) -> float:
        variance = self.total_squared / max(1, self.num) - self.mean**2
        return math.sqrt(variance) if variance > 1e-14 * self.mean**2 else 0.0

    @property
    def center(self) -> float:
        """The mean where it is more than the noise of a few draws, else 0."""
        return self.mean if abs(self.mean) > 6 * self.std / math.sqrt(max(1, self.num)) else 0.0


def _measure_init(
    build: Callable[[float], nn.Module], target: nn.Module, width_scale: float, rules: Mapping[str, ParamRule]
) -> dict[str, InitScale]:
    num_values = sum(parameter.numel() for parameter in target.parameters())
    num_builds = 16 if num_values < 1_000_000 else 4 if num_values < 20_000_000 else 1
    wide = _statistics(build, 1.0, num_builds)
    narrow = _statistics(build, 1 / width_scale, num_builds)
    scales = {}
    for name, rule in rules.items():
        if wide[name].std == 0 and narrow[name].std == 0:
            if wide[name].mean != narrow[name].mean:
                scales[name] = InitScale(narrow[name].mean, 1.0, wide[name].mean)
            continue
        if wide[name].std == 0 or narrow[name].std == 0:
            raise SurrogateError(
                f"parameter {name} is constant at one width and random at another: build(width) must "
                "initialise alike at every width"
            )
        factor = wide[name].std * rule.init_std / narrow[name].std
        scales[name] = InitScale(narrow[name].center, factor, wide[name].center)
    return scales


def _statistics(build: Callable[[float], nn.Module], width: float, num_builds: int) -> dict[str, _Statistics]:
    statistics: dict[str, _Statistics] = {}
    for index in range(num_builds):
        for name, parameter in build_seeded(build, width, REFERENCE_SEED + index).named_parameters():
            statistics.setdefault(name, _Statistics()).add(parameter)
    return statistics
