"""The surrogate's init: drawn by the user's own code, then brought to the standard deviation that it is to have.

The target's standard deviations are measured, parameter by parameter: many models initialise with a constant that
ignores width, and a formula would be wrong for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hydro_slurm.errors import HydroError, SurrogateError
from hydro_trials.study_file import describe_error
from hydro_trials.surrogate.rules import ParamRule

REFERENCE_SEED = 20_221
"""Init statistics are measured from this seed on, so that every process and lane uses the same ones."""


@dataclass(frozen=True)
class InitScale:
    """How a narrow model's own draw becomes the surrogate's: (draw - center) * factor + offset."""

    center: float
    factor: float
    offset: float


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


def measure_init(
    build: Callable[[float], nn.Module], target: nn.Module, width_scale: float, rules: Mapping[str, ParamRule]
) -> dict[str, InitScale]:
    """What each parameter's draw at width 1 / `width_scale` needs; parameters that need nothing are left out.

    Raises:
        SurrogateError: A parameter is random at one width and constant at the other.
    """
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
