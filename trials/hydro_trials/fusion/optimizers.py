"""Optimizers of many lanes at once: every hyperparameter is a tensor with one value per lane.

They compute what torch.optim's SGD, Adam and AdamW compute for each lane alone (tested in float64). State lies in flat
matrices like the parameters', so a lane keeps its state when others leave.

Shape suffixes: F = lanes, P = values per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hydro_slurm.errors import FusionError
from hydro_trials.fusion.layout import FlatLayout
from hydro_trials.hyperparameters import lr_multiplier
from hydro_trials.surrogate.rules import ParamRule

SEGMENT_VALUES = 1 << 16
"""A longer matrix is updated in several pieces with a boundary between them."""

SLOTS: dict[str, tuple[str, ...]] = {
    "sgd": ("momentum",),
    "adam": ("mean", "mean_square"),
    "adamw": ("mean", "mean_square"),
}


@dataclass(frozen=True)
class LaneSettings:
    """What one lane's next update needs."""

    step: int
    """Updates done so far."""
    values: dict[str, float]
    """Its complete hyperparameters."""


class FusedOptimizer:
    """Updates flat parameters [F, P] in place."""

    def __init__(
        self, kind: str, schedule: str, num_steps: int, layout: FlatLayout, rules: dict[str, ParamRule]
    ) -> None:
        if kind not in SLOTS:
            raise FusionError(f"got optimizer {kind!r}, needed one of {', '.join(SLOTS)}")
        self.kind, self.schedule, self.num_steps = kind, schedule, num_steps
        self.slot_names = SLOTS[kind]
        self._dtype = layout.dtype
        self._lr_P = layout.spread({name: rules[name].lr for name in layout.shapes})
        self._decay_P = layout.spread({name: rules[name].weight_decay for name in layout.shapes})
        self._decayed_lr_P = layout.spread({name: rules[name].lr * rules[name].weight_decay for name in layout.shapes})
        self._eps_P = layout.spread({name: rules[name].eps for name in layout.shapes})

    @torch.no_grad()
    def update(
        self,
        flat_FP: Tensor,
        grad_FP: Tensor,
        slots: dict[str, Tensor],
        lanes: Sequence[LaneSettings],
        boundary: Callable[[], None] = lambda: None,
    ) -> None:
        """One step of every lane, in place.

        Args:
            flat_FP: Parameters.
            grad_FP: Gradients; overwritten.
            slots: State, one matrix like `flat_FP` for each of `slot_names`.
            lanes: One entry per row.
            boundary: Called between pieces; must not raise, or lanes would be left half updated.
        """
        step = self._update_sgd if self.kind == "sgd" else self._update_adam
        table = self._table(lanes)
        width = max(64, SEGMENT_VALUES // max(1, flat_FP.shape[0]) // 64 * 64)
        for start in range(0, flat_FP.shape[1], width):
            if start:
                boundary()
            part = slice(start, start + width)
            step(flat_FP[:, part], grad_FP[:, part], {k: v[:, part] for k, v in slots.items()}, table, part)

    def _table(self, lanes: Sequence[LaneSettings]) -> dict[str, Tensor]:
        """Per-lane numbers of this step as tensors [F, 1]; computed in Python, hence alike in every row."""
        columns: dict[str, list[float]] = {}
        for lane in lanes:
            values = lane.values
            lr = values["lr"] * lr_multiplier(self.schedule, lane.step, self.num_steps, values)
            row = {"lr": lr, "weight_decay": values["weight_decay"]}
            if self.kind == "sgd":
                row["momentum"], row["nesterov"] = values["momentum"], float(bool(values["nesterov"]))
            else:
                beta1, beta2, count = values["beta1"], values["beta2"], lane.step + 1
                row["beta1_rest"], row["beta2"], row["beta2_rest"] = 1 - beta1, beta2, 1 - beta2
                row["step_size"] = -lr / (1 - beta1**count)
                row["root_correction"] = (1 - beta2**count) ** 0.5
                row["eps"] = values["eps"]
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
        numbers = torch.tensor(list(columns.values()), dtype=self._dtype).unsqueeze(-1)
        return dict(zip(columns, numbers.unbind(0), strict=True))

    def _update_sgd(
        self, flat_FP: Tensor, grad_FP: Tensor, slots: dict[str, Tensor], table: dict[str, Tensor], part: slice
    ) -> None:
        self._add_decay(flat_FP, grad_FP, table, part)
        if bool(table["momentum"].any()):
            momentum_FP = slots["momentum"]
            momentum_FP.mul_(table["momentum"]).add_(grad_FP)
            if bool(table["nesterov"].any()):
                ahead_FP = torch.addcmul(grad_FP, momentum_FP, table["momentum"])
                grad_FP = torch.where(table["nesterov"] > 0, ahead_FP, momentum_FP)
            else:
                grad_FP = momentum_FP
        flat_FP.addcmul_(grad_FP, _times(-table["lr"], self._lr_P, part))

    def _update_adam(
        self, flat_FP: Tensor, grad_FP: Tensor, slots: dict[str, Tensor], table: dict[str, Tensor], part: slice
    ) -> None:
        if self.kind == "adam":
            self._add_decay(flat_FP, grad_FP, table, part)
        elif bool(table["weight_decay"].any()):
            flat_FP.mul_(1 - _times(table["lr"] * table["weight_decay"], self._decayed_lr_P, part))
        mean_FP, mean_square_FP = slots["mean"], slots["mean_square"]
        mean_FP.lerp_(grad_FP, table["beta1_rest"])
        mean_square_FP.mul_(table["beta2"]).addcmul_(grad_FP.square(), table["beta2_rest"])
        denominator_FP = mean_square_FP.sqrt().div_(table["root_correction"])
        denominator_FP.add_(_times(table["eps"], self._eps_P, part))
        flat_FP.addcdiv_(mean_FP * _times(table["step_size"], self._lr_P, part), denominator_FP)

    def _add_decay(self, flat_FP: Tensor, grad_FP: Tensor, table: dict[str, Tensor], part: slice) -> None:
        if bool(table["weight_decay"].any()):
            grad_FP.addcmul_(flat_FP, _times(table["weight_decay"], self._decay_P, part))


def _times(lanes_F1: Tensor, factors_P: Tensor | None, part: slice) -> Tensor:
    return lanes_F1 if factors_P is None else lanes_F1 * factors_P[part]
