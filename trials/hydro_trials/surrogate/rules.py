"""Maximal update parametrization as data: what each parameter of a surrogate gets, relative to its target.

The target keeps its native parametrization. S = target width / surrogate width; all widths shrink alike, so the
ratio of fan-out to fan-in is 1.

| kind   | init std                     | SGD lr    | Adam(W) lr | decay: SGD, Adam | decay: AdamW | eps     |
| ------ | ---------------------------- | --------- | ---------- | ---------------- | ------------ | ------- |
| input  | the target's                 | / S       | unchanged  | times S          | unchanged    | times S |
| hidden | the target's times sqrt(S)   | unchanged | times S    | unchanged        | / S          | times S |
| output | the target's (forward: S x)  | / S       | unchanged  | times S          | unchanged    | times S |
| fixed  | the target's                 | unchanged | unchanged  | unchanged        | unchanged    | unchanged |

A surrogate's gradients are S times the target's (the readout's input is multiplied by S), hence eps. SGD and AdamW
keep lr x decay. Adam divides its L2 term by the gradient's size as well, so its coefficient grows with the ratio of
gradient to weight, which for hidden weights does not change. RMSprop and Adagrad, whose steps do not depend on the
gradient's size either, follow Adam; Lion, whose decay is decoupled, follows AdamW.

Source: Yang et al., Tensor Programs V (2022), table 8, and the measurements quoted in this project's design.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hydro_slurm.errors import SurrogateError

_FOLLOWS = {"sgd": "sgd", "adam": "adam", "adamw": "adamw", "rmsprop": "adam", "adagrad": "adam", "lion": "adamw"}
"""The column of the table that each optimizer takes."""


@dataclass(frozen=True)
class ParamRule:
    """Factors of one parameter: on its init std, learning rate, weight decay and Adam's eps."""

    kind: str
    init_std: float = 1.0
    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


def param_rules(kinds: Mapping[str, str], width_scale: float, optimizer: str) -> dict[str, ParamRule]:
    """The rule of each parameter, by name.

    Raises:
        SurrogateError: The optimizer has no known rule.
    """
    if optimizer not in _FOLLOWS:
        raise SurrogateError(f"optimizer {optimizer!r} has no known rule for width_scale {width_scale:g}")
    return {name: _rule(kind, width_scale, _FOLLOWS[optimizer]) for name, kind in kinds.items()}


def _rule(kind: str, scale: float, column: str) -> ParamRule:
    if kind == "fixed" or scale == 1:
        return ParamRule(kind)
    if kind == "hidden":
        if column == "sgd":
            return ParamRule(kind, init_std=math.sqrt(scale), eps=scale)
        decay = 1 / scale if column == "adamw" else 1.0
        return ParamRule(kind, init_std=math.sqrt(scale), lr=scale, weight_decay=decay, eps=scale)
    if column == "sgd":
        return ParamRule(kind, lr=1 / scale, weight_decay=scale, eps=scale)
    return ParamRule(kind, weight_decay=1.0 if column == "adamw" else scale, eps=scale)
