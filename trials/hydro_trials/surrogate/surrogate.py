"""The surrogate of a model: its narrow version, initialised and parametrized so that hyperparameters carry over."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hydro_slurm.errors import SurrogateError
from hydro_trials.samples import first
from hydro_trials.study import HuggingFace
from hydro_trials.surrogate.attention import scale_scores
from hydro_trials.surrogate.classify import Classification, classify
from hydro_trials.surrogate.init_scale import REFERENCE_SEED, InitScale, build_seeded, measure_init
from hydro_trials.surrogate.rules import ParamRule, ratio_rules

if TYPE_CHECKING:
    from hydro_trials.study import Data, Study

ModelSource = Callable[[float], nn.Module] | HuggingFace | nn.Module


@dataclass(frozen=True)
class Surrogate:
    """What it takes to train a model at width 1 / S. With S = 1 it is the target itself, every factor 1."""

    build: Callable[[float], nn.Module]
    width_scale: float
    classification: Classification
    rules: dict[str, ParamRule]
    init_scales: dict[str, InitScale]
    notes: tuple[str, ...] = ()
    """What the user should know about how it was shrunk."""

    def make(self, seed: int) -> nn.Module:
        """A new surrogate, its parameters drawn from `seed` alone (a module that trains itself has its own)."""
        module = build_seeded(self.build, 1 / self.width_scale, seed)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                scale = self.init_scales.get(name)
                if scale is not None:
                    parameter.sub_(scale.center).mul_(scale.factor).add_(scale.offset)
        for name, factor in self.classification.readout_factors.items():
            module.get_submodule(name).register_forward_pre_hook(_ScaleInput(factor))
        for name, head in self.classification.heads.items():
            scale_scores(module.get_submodule(name), head)
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
    build: ModelSource,
    width_scale: float,
    optimizer: str,
    *,
    parameter_kinds: Mapping[str, str] | None = None,
    example: Tensor | None = None,
    scale_decay: bool = True,
    sgd_rule: str = "mup",
    redraw: bool = False,
) -> Surrogate:
    """Shrink a model by `width_scale` and work out what every parameter gets.

    Args:
        build: A factory `build(width)`, a `HuggingFace` description, or a module.
        width_scale: S.
        optimizer: What the surrogate will be trained with.
        parameter_kinds: Kinds of parameters that shapes cannot tell.
        example: Inputs (samples, ...) to trace a module with; needed where `build` is one.
        scale_decay: See `rules.ratio_rules`.
        sgd_rule: See `rules.ratio_rules`.
        redraw: With S = 1, draw the weights of a module anew from each seed as at every other width, where they are to
            be compared; else each seed has the module's own weights.

    Raises:
        SurrogateError: The model does not build, cannot be shrunk by that much, or a parameter has no known rule.
    """
    factory = as_factory(build, example, own_weights=width_scale == 1 and not redraw)
    target = build_seeded(factory, 1.0, REFERENCE_SEED)
    if width_scale == 1:
        classification = classify(target, target, 1.0)
        return Surrogate(factory, 1.0, classification, ratio_rules(classification.parameters, optimizer), {})
    narrow = build_seeded(factory, 1 / width_scale, REFERENCE_SEED)
    classification = classify(target, narrow, width_scale, parameter_kinds)
    if all(kind == "fixed" for kind in classification.kinds.values()):
        raise SurrogateError(
            f"no parameter changes between width 1 and 1/{width_scale:g}: build(width) does not use its argument; "
            "multiply the hidden widths by it, or set width_scale to 1"
        )
    rules = ratio_rules(classification.parameters, optimizer, scale_decay=scale_decay, sgd_rule=sgd_rule)
    scales = measure_init(factory, target, width_scale, rules)
    return Surrogate(factory, width_scale, classification, rules, scales, getattr(factory, "notes", ()))


def study_surrogate(study: Study, width_scale: float, data: Data, *, redraw: bool = False) -> Surrogate:
    """The surrogate of a study's model; `redraw` as in `make_surrogate`.

    Raises:
        SurrogateError: As `make_surrogate` does.
    """
    return make_surrogate(
        study.build,
        width_scale,
        study.optimizer,
        parameter_kinds=study.parameter_kinds,
        example=first(data.train[0], 2),
        scale_decay=study.scale_decay,
        redraw=redraw,
    )


def standard_surrogate(study: Study, width_scale: float, data: Data) -> Surrogate:
    """The same narrow model with no rule applied: what transfer looks like without muP.

    Raises:
        SurrogateError: The model cannot be built at that width.
    """
    factory = as_factory(study.build, first(data.train[0], 2), own_weights=width_scale == 1)
    narrow = build_seeded(factory, 1 / width_scale, REFERENCE_SEED)
    classification = classify(narrow, narrow, 1.0)
    return Surrogate(factory, width_scale, classification, ratio_rules(classification.parameters, study.optimizer), {})


def as_factory(
    build: ModelSource, example: Tensor | None, *, own_weights: bool = False
) -> Callable[[float], nn.Module]:
    """A function of width, whichever way the model was given.

    Args:
        build: As in `make_surrogate`.
        example: As in `make_surrogate`.
        own_weights: Whether only width 1 is asked for, where a module is copied as it is and need not be traceable.

    Raises:
        SurrogateError: The model cannot be shrunk at all.
    """
    if isinstance(build, HuggingFace):
        from hydro_trials.surrogate.hugging_face import HuggingFaceFactory

        return HuggingFaceFactory(build)
    if isinstance(build, nn.Module):
        if own_weights:
            return lambda width: copy.deepcopy(build)
        from hydro_trials.surrogate.traced import TracedFactory

        if example is None:
            raise SurrogateError("a module without a factory is shrunk by tracing it: give example inputs")
        if not isinstance(example, Tensor):
            raise SurrogateError(
                f"got a module with inputs in a {type(example).__name__}: only a module with one input can be traced; "
                "give a function build(width), or width_scale 1"
            )
        return TracedFactory(build, example)
    return build


def check_readouts(surrogate: Surrogate, module: nn.Module) -> None:
    """After a forward pass of `module`: every readout must have been called as a module.

    Raises:
        SurrogateError: One was not (its weight is used directly), so its input went unscaled.
    """
    for name in surrogate.classification.readouts:
        hooks: Any = module.get_submodule(name)._forward_pre_hooks.values()
        if not any(isinstance(hook, _ScaleInput) and hook.num_calls for hook in hooks):
            raise SurrogateError(
                f"module {name} is a readout, but the model's forward does not call it (it uses the weight directly): "
                "call the module, so that its input can be scaled"
            )
