"""Whether two ways of running lanes give the same numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hydro_slurm.errors import FusionError

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-3}
"""Largest difference between two ways, relative to the largest value of a tensor."""
BF16_TOLERANCE = 0.1
NOISE = 1e-4
"""Tensors this much smaller than the largest of all are judged by that one: what is zero but for rounding."""


def check_agreement(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], kind: str, *, bf16: bool) -> None:
    """Compare named tensors.

    Raises:
        FusionError: One of them differs by more than rounding explains.
    """
    floors = [tensor.abs().max() for name, tensor in expected.items() if "gradient" in name and tensor.numel()]
    floor = NOISE * float(torch.stack(floors).max()) if floors else 0.0
    for name, wanted in expected.items():
        if not wanted.is_floating_point():
            if not torch.equal(wanted, found[name]):
                raise FusionError(f"the {kind} path gives another {name} than the general path; it is not used")
            continue
        tolerance = BF16_TOLERANCE if bf16 else TOLERANCES.get(wanted.dtype, BF16_TOLERANCE)
        scale = max(float(wanted.abs().max()), floor if "gradient" in name else 0.0) if wanted.numel() else 0.0
        distance = float((wanted - found[name]).abs().max()) if wanted.numel() else 0.0
        if not distance <= tolerance * scale and not (distance == 0 == scale):
            raise FusionError(
                f"the {kind} path differs from the general path in {name} by {distance:.1e} at a largest value of "
                f"{scale:.1e}; it is not used"
            )
