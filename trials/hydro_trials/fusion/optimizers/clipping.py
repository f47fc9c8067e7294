"""Gradient clipping, each lane for itself: a lane's gradient that is not finite never reaches another lane's.

Shape suffixes: F = lanes, P = values per row, W = values per row of one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hydro_trials.fusion.layout import ROW_ALIGNMENT
from hydro_trials.fusion.optimizers.piece import LaneSettings

NORM_SLACK = 1e-6
"""torch.nn.utils.clip_grad_norm_ adds this to the norm that it divides by."""


@torch.no_grad()
def clip_gradients(
    grad_FP: Tensor,
    lanes: Sequence[LaneSettings],
    scale_P: Tensor | None = None,
    boundary: Callable[[], None] = lambda: None,
) -> None:
    """Clip in place: by the lane's norm to `clip_norm`, then every value to `clip_value`; 0 leaves out either.

    Like clip_grad_norm_ (2-norm over all of a lane's parameters, no error where it is not finite) and
    clip_grad_value_ of torch.nn.utils. The gradient of a lane that clips nothing keeps its bits.

    Args:
        grad_FP: Gradients; gaps between parameters are 0.
        lanes: One entry per row.
        scale_P: How large a surrogate's gradients are relative to the target's: `clip_value` is scaled alike.
            (`clip_norm` is not: the norm of a hidden weight's gradient does not change with width.)
        boundary: Called between pieces; must not raise.
    """
    norms = [lane.values["clip_norm"] for lane in lanes]
    limits = [lane.values["clip_value"] for lane in lanes]
    if any(norms):
        norm_F1 = _norm(grad_FP, boundary)
        largest_F1 = _column(norms, grad_FP)
        coefficient_F1 = (largest_F1 / (norm_F1 + NORM_SLACK)).clamp_(max=1.0)
        coefficient_F1 = torch.where(largest_F1 > 0, coefficient_F1, 1.0)
        for part in _pieces(grad_FP):
            boundary()
            grad_FP[:, part].mul_(coefficient_F1)
    if any(limits):
        limit_F1 = _column([limit or float("inf") for limit in limits], grad_FP)
        for part in _pieces(grad_FP):
            boundary()
            limit_FW = limit_F1 if scale_P is None else limit_F1 * scale_P[part]
            grad_FP[:, part].clamp_(min=-limit_FW, max=limit_FW)


def _norm(grad_FP: Tensor, boundary: Callable[[], None]) -> Tensor:
    """The 2-norm of every row, (F, 1).

    Added up by halves, elementwise: torch does not promise that its own reductions add in one order whatever the
    number of rows, and where they don't, a lane's bits would depend on its company.
    """
    total_FW = grad_FP.new_zeros(grad_FP.shape[0], min(ROW_ALIGNMENT, grad_FP.shape[1]))
    for part in _pieces(grad_FP):
        boundary()
        folded_FW = _fold(grad_FP[:, part].square(), ROW_ALIGNMENT)
        total_FW[:, : folded_FW.shape[1]].add_(folded_FW)
    return _fold(total_FW, 1).sqrt()


def _fold(values_FW: Tensor, width: int) -> Tensor:
    """Add the right half to the left one, in place, until no more than `width` columns are left."""
    while values_FW.shape[1] > width:
        half = (values_FW.shape[1] + 1) // 2
        rest_FW = values_FW[:, half:]
        values_FW[:, : rest_FW.shape[1]].add_(rest_FW)
        values_FW = values_FW[:, :half]
    return values_FW


def _pieces(grad_FP: Tensor) -> list[slice]:
    """Columns of a fixed number, whatever the number of rows: sums over them do not depend on it."""
    width = 1 << 12 if grad_FP.device.type == "cpu" else 1 << 18
    return [slice(start, start + width) for start in range(0, grad_FP.shape[1], width)]


def _column(numbers: Sequence[float], like_FP: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like_FP.dtype, device=like_FP.device).unsqueeze(-1)
