"""Whether a way of running lanes gives the numbers of the general path: it is not used before it has shown that."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hydro_slurm.errors import FusionError
from hydro_trials.fusion.batch import LaneBatch
from hydro_trials.fusion.program import Program

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-3}
"""Largest difference that rounding explains, as a share of the largest value."""
BF16_TOLERANCE = 0.15


def tolerance_of(dtype: torch.dtype, *, lower: bool) -> float:
    """What to allow parameters of this type; `lower` where forward and backward compute in bf16."""
    return BF16_TOLERANCE if lower else TOLERANCES.get(dtype, BF16_TOLERANCE)


def check_agreement(
    program: Program,
    reference: Program,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    batch: LaneBatch,
    tolerance: float,
) -> None:
    """Compare two programs on one batch. Changes nothing.

    Args:
        program: What is to show itself.
        reference: The general program of the same model.
        parameters: As for `Program.gradients`.
        buffers: Likewise; copies are used.
        batch: Likewise.
        tolerance: Largest difference allowed, relative to a tensor's largest value; of a gradient, to the largest of
            all gradients of its lane, because some are rounding noise around zero.

    Raises:
        FusionError: Losses, gradients or buffers differ by more, or the program fails where the reference does not:
            says which, or why.
    """
    own, theirs = _copied(buffers), _copied(buffers)
    expected_losses_F, expected = reference.gradients(parameters, theirs, batch)
    path = f"the {program.kind} path"
    try:
        losses_F, gradients = program.gradients(parameters, own, batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise FusionError(f"{path} fails where the general one does not: {reason}") from error
    _compare(path, "losses", losses_F, expected_losses_F, tolerance)
    largest = [g.detach().abs().reshape(batch.num_lanes, -1).amax(1) for g in expected if g is not None and g.numel()]
    scale_F = torch.stack(largest).amax(0)
    for name, gradient, other in zip(parameters, gradients, expected, strict=True):
        if gradient is not None and other is not None:
            _compare(path, f"gradients of {name}", gradient, other, tolerance, scale_F)
        elif gradient is not other:
            raise FusionError(f"{path} disagrees with the general one on whether {name} is used")
    for name, buffer in own.items():
        _compare(path, f"buffer {name}", buffer, theirs[name], tolerance)


def _copied(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in buffers.items()}


def _compare(path: str, what: str, own: Tensor, other: Tensor, tolerance: float, scale_F: Tensor | None = None) -> None:
    if own.shape != other.shape or own.dtype != other.dtype:
        raise FusionError(
            f"{path} disagrees with the general one: {what} are {own.dtype} {tuple(own.shape)}, "
            f"needed {other.dtype} {tuple(other.shape)}"
        )
    if own.numel() == 0:
        return
    own_F, other_F = (t.detach().double().reshape(t.shape[0], -1) for t in (own, other))
    largest_F = other_F.abs().amax(1) if scale_F is None else scale_F.double()
    error = float(((own_F - other_F).abs().amax(1) / largest_F.clamp(min=1e-30)).max())
    if not error <= tolerance:
        raise FusionError(
            f"{path} disagrees with the general one: {what} differ by {error:.2g} of the largest value, "
            f"needed at most {tolerance:g}"
        )
