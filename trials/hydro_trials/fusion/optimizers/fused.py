"""One update of all lanes: this step's numbers as columns, then the optimizer's rule, piece by piece.

Shape suffixes: F = lanes, P = values per row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hydro_slurm.errors import FusionError
from hydro_trials.fusion.layout import FlatLayout
from hydro_trials.fusion.optimizers.adagrad import ADAGRAD
from hydro_trials.fusion.optimizers.adam import ADAM, ADAMW
from hydro_trials.fusion.optimizers.clipping import clip_gradients
from hydro_trials.fusion.optimizers.lion import LION
from hydro_trials.fusion.optimizers.piece import Family, LaneSettings, Piece
from hydro_trials.fusion.optimizers.rmsprop import RMSPROP
from hydro_trials.fusion.optimizers.sgd import SGD
from hydro_trials.schedules import lr_multiplier
from hydro_trials.surrogate.rules import ParamRule

SEGMENT_VALUES = 1 << 16
"""A longer matrix is updated in several pieces with a boundary between them."""

DEVICE_SEGMENT_VALUES = 1 << 24
"""The same on an accelerator, where many small pieces would cost more to launch than to compute."""

FAMILIES: dict[str, Family] = {
    "sgd": SGD,
    "adam": ADAM,
    "adamw": ADAMW,
    "rmsprop": RMSPROP,
    "adagrad": ADAGRAD,
    "lion": LION,
}

SWITCHES = frozenset({"weight_decay", "momentum", "dampening", "nesterov", "amsgrad", "centered"})
"""Hyperparameters whose work is left out where the study uses them in no lane."""


def slot_names(kind: str, used: Collection[str]) -> tuple[str, ...]:
    """The optimizer state that is kept where lanes use the hyperparameters `used` (searched, or other than 0).

    Raises:
        FusionError: The optimizer is unknown.
    """
    if kind not in FAMILIES:
        raise FusionError(f"got optimizer {kind!r}, needed one of {', '.join(FAMILIES)}")
    return tuple(name for name, needed in FAMILIES[kind].slots.items() if not needed or needed in used)


class FusedOptimizer:
    """Updates flat parameters [F, P] in place.

    Args:
        kind: One of FAMILIES.
        schedule: One of the schedules.
        num_steps: The whole budget, which schedules refer to.
        layout: Where each parameter lies in a row.
        rules: The surrogate's factors of each parameter.
        used: Hyperparameters that some lane of the study may use (`used_hyperparameters`); all where not given,
            which costs time and state.
    """

    def __init__(
        self,
        kind: str,
        schedule: str,
        num_steps: int,
        layout: FlatLayout,
        rules: Mapping[str, ParamRule],
        used: Collection[str] = SWITCHES,
    ) -> None:
        self.slot_names = slot_names(kind, used)
        self.kind, self.schedule, self.num_steps = kind, schedule, num_steps
        self._family = FAMILIES[kind]
        self._used, self._unused = frozenset(used), sorted(SWITCHES - frozenset(used))
        self._layout, self._rules = replace(layout, dtype=torch.float64), rules
        self._factors_P: dict[str, Tensor] = {}
        self._gaps_P: Tensor | None = None
        self._like: tuple[torch.device, torch.dtype] | None = None

    def initial_slots(self, values: Mapping[str, float]) -> dict[str, float]:
        """The value that every slot of a new lane with these hyperparameters is filled with.

        Raises:
            FusionError: The lane has a hyperparameter that the study was said not to use.
        """
        self._refuse_unused(values)
        first = self._family.first_values
        return {name: values[first[name]] if name in first else 0.0 for name in self.slot_names}

    @torch.no_grad()
    def update(
        self,
        flat_FP: Tensor,
        grad_FP: Tensor,
        slots: Mapping[str, Tensor],
        lanes: Sequence[LaneSettings],
        boundary: Callable[[], None] = lambda: None,
    ) -> None:
        """One step of every lane, in place: gradients are clipped, then parameters and state change.

        Args:
            flat_FP: Parameters.
            grad_FP: Gradients; overwritten.
            slots: State, one matrix like `flat_FP` for each of `slot_names`.
            lanes: One entry per row.
            boundary: Called between pieces; must not raise, or lanes would be left half updated.

        Raises:
            FusionError: A lane has a hyperparameter that the study was said not to use; nothing has changed then.
        """
        numbers = self._numbers(lanes, flat_FP)
        self._prepare_rows(flat_FP)
        gaps_P = self._gaps_P if any(lane.values.get("eps") == 0 for lane in lanes) else None
        clip_gradients(grad_FP, lanes, self._factors_P.get("eps"), boundary)
        most = SEGMENT_VALUES if flat_FP.device.type == "cpu" else DEVICE_SEGMENT_VALUES
        width = max(64, most // max(1, flat_FP.shape[0]) // 64 * 64)
        for start in range(0, flat_FP.shape[1], width):
            if start:
                boundary()
            part = slice(start, start + width)
            self._family.update(
                Piece(
                    flat=flat_FP[:, part],
                    grad=grad_FP[:, part],
                    slots={name: slot_FP[:, part] for name, slot_FP in slots.items()},
                    numbers=numbers,
                    factors={name: factor_P[part] for name, factor_P in self._factors_P.items()},
                    gaps=None if gaps_P is None else gaps_P[part],
                    used=self._used,
                )
            )

    def _refuse_unused(self, values: Mapping[str, float]) -> None:
        for name in self._unused:
            if values.get(name):
                raise FusionError(
                    f"got a lane with {name} {values[name]:g}, but the study neither searches nor fixes {name}; "
                    "name it in space or fixed"
                )

    def _numbers(self, lanes: Sequence[LaneSettings], like_FP: Tensor) -> dict[str, Tensor]:
        """Per-lane numbers of this step as tensors (F, 1)."""
        columns: dict[str, list[float]] = {}
        for lane in lanes:
            self._refuse_unused(lane.values)
            lr = lane.values["lr"] * lr_multiplier(self.schedule, lane.step, self.num_steps, lane.values)
            for name, value in self._family.numbers(lane.values, lr, lane.step).items():
                columns.setdefault(name, []).append(value)
        table = torch.tensor(list(columns.values()), dtype=like_FP.dtype, device=like_FP.device).unsqueeze(-1)
        return dict(zip(columns, table.unbind(0), strict=True))

    def _prepare_rows(self, like_FP: Tensor) -> None:
        """What differs along a row but not between lanes, where the parameters are and in their precision."""
        like = (like_FP.device, like_FP.dtype)
        if like == self._like:
            return
        of = self._rules
        factors = {
            "lr": {name: of[name].lr for name in self._layout.shapes},
            "weight_decay": {name: of[name].weight_decay for name in self._layout.shapes},
            "lr_x_weight_decay": {name: of[name].lr * of[name].weight_decay for name in self._layout.shapes},
            "eps": {name: of[name].eps for name in self._layout.shapes},
        }
        rows = {name: self._layout.spread(by_parameter) for name, by_parameter in factors.items()}
        gaps_P = self._layout.spread(dict.fromkeys(self._layout.shapes, 0.0))
        self._factors_P = {name: row_P.to(*like) for name, row_P in rows.items() if row_P is not None}
        self._gaps_P = None if gaps_P is None else gaps_P.to(*like)
        self._like = like
