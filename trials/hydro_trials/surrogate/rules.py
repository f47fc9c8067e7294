"""Maximal update parametrization as data: what each parameter of a surrogate gets, relative to its target.

The target keeps its native parametrization. r_in and r_out are target size / surrogate size of a weight's incoming and
outgoing dimension; where all widths shrink alike, both are S.

| kind   | init std                     | SGD lr       | Adam-like lr | gradient |
| ------ | ---------------------------- | ------------ | ------------ | -------- |
| input  | the target's                 | / r_out      | unchanged    | x r_out  |
| hidden | the target's x sqrt(r_in)    | r_in / r_out | x r_in       | x r_out  |
| output | the target's (forward: r_in) | / r_in       | unchanged    | x r_in   |
| fixed  | the target's                 | unchanged    | unchanged    | x 1      |

Everything else follows from two columns. `eps` is added to the size of a gradient, so it grows as the gradient does.
Decay is to shrink weights alike at every width: SGD, AdamW and Lion take lr x decay off in each step, so the
coefficient is divided by the lr's factor; Adam, RMSprop and Adagrad with L2 in the gradient divide that term by the
gradient's size too, so theirs is the gradient's factor over the lr's. (The reference package `mup` treats Adam's L2 as
AdamW's decay: weights then shrink unlike at different widths, which a test shows.)

RMSprop, Adagrad and Lion divide the gradient by its own size (or take its sign), as Adam does, and follow its rule.

Source: Yang et al., Tensor Programs V (2022), tables 3 and 8; the ratios of a weight's two dimensions: appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hydro_slurm.errors import SurrogateError

if TYPE_CHECKING:
    from hydro_trials.surrogate.classify import ParameterShape

GRADIENT_SIZED = ("sgd",)
"""Optimizers whose step is as large as the gradient."""
COUPLED = ("adam", "rmsprop", "adagrad")
"""Those that divide by the gradient's size, with weight decay as a part of the gradient."""
DECOUPLED = ("adamw", "lion")
"""The same with weight decay of its own."""
SGD_RULES = ("mup", "times_s")
"""What hidden weights under SGD get: muP's unchanged learning rate, or S times it as in the Hydro paper (OSDI 2023)."""


@dataclass(frozen=True)
class ParamRule:
    """Factors of one parameter: on its init std, learning rate, weight decay and Adam's eps."""

    kind: str
    init_std: float = 1.0
    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


def param_rules(kinds: Mapping[str, str], width_scale: float, optimizer: str) -> dict[str, ParamRule]:
    """The rule of each parameter, by name, where all widths shrink by `width_scale`.

    Raises:
        SurrogateError: The optimizer has no known rule.
    """
    _check_known(optimizer)
    return {
        name: _rule(
            kind,
            width_scale if kind in ("hidden", "output") else 1.0,
            width_scale if kind in ("hidden", "input") else 1.0,
            optimizer,
        )
        for name, kind in kinds.items()
    }


def ratio_rules(
    parameters: Mapping[str, ParameterShape],
    optimizer: str,
    *,
    scale_decay: bool = True,
    sgd_rule: str = "mup",
) -> dict[str, ParamRule]:
    """The rule of each parameter, by name, from its own ratios of target and surrogate size.

    Args:
        parameters: Their kinds and ratios.
        optimizer: One of the fused optimizers; any where nothing shrinks.
        scale_decay: Whether decoupled decay keeps lr x decay; False leaves its coefficient alone. The literature
            disagrees: lr x decay is the share of a weight that a step takes off.
        sgd_rule: One of `SGD_RULES`.

    Raises:
        SurrogateError: The optimizer has no known rule.
    """
    if sgd_rule not in SGD_RULES:
        raise SurrogateError(f"SGD rule {sgd_rule!r}: needed one of {', '.join(SGD_RULES)}")
    if any(parameter.kind != "fixed" for parameter in parameters.values()):
        _check_known(optimizer)
    rules = {}
    for name, parameter in parameters.items():
        rule = _rule(parameter.kind, parameter.fan_in_ratio, parameter.fan_out_ratio, optimizer)
        if optimizer in DECOUPLED and not scale_decay:
            rule = replace(rule, weight_decay=1.0)
        if optimizer in GRADIENT_SIZED and sgd_rule == "times_s" and parameter.kind == "hidden":
            lr = rule.lr * parameter.fan_in_ratio
            rule = replace(rule, lr=lr, weight_decay=1 / lr)
        rules[name] = rule
    return rules


def _check_known(optimizer: str) -> None:
    known = (*GRADIENT_SIZED, *COUPLED, *DECOUPLED)
    if optimizer not in known:
        raise SurrogateError(
            f"optimizer {optimizer!r} has no known rule for a surrogate: use width_scale 1, or one of "
            f"{', '.join(known)}"
        )


def _rule(kind: str, fan_in: float, fan_out: float, optimizer: str) -> ParamRule:
    if kind == "fixed" or fan_in == fan_out == 1:
        return ParamRule(kind)
    gradient = fan_in if kind == "output" else fan_out
    if optimizer in GRADIENT_SIZED:
        lr = fan_in / fan_out if kind == "hidden" else 1 / gradient
    else:
        lr = fan_in if kind == "hidden" else 1.0
    decay = gradient / lr if optimizer in COUPLED else 1 / lr
    return ParamRule(kind, math.sqrt(fan_in) if kind == "hidden" else 1.0, lr, decay, gradient)
