"""Where each parameter of a model lies in one flat row per lane.

All trainable parameters of a lane form one row of a matrix [F, P]: an optimizer step is then a handful of operations on
that matrix instead of a handful per parameter, and stopping a lane is one index_select. Every parameter starts at a
multiple of 16 values and a row is a multiple of 64: vector instructions then never meet the end of a row, whose
rounding could otherwise depend on the lane's place.

Shape suffixes: F = lanes, P = values per row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from hydro_slurm.errors import FusionError

PARAMETER_ALIGNMENT = 16
ROW_ALIGNMENT = 64


@dataclass(frozen=True)
class FlatLayout:
    """Names, shapes and offsets of the trainable parameters in a row."""

    shapes: dict[str, torch.Size]
    offsets: dict[str, int]
    row_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, module: nn.Module) -> FlatLayout:
        """The layout of a module's parameters that require a gradient.

        Raises:
            FusionError: There are none, or they have different or no floating-point types.
        """
        shapes: dict[str, torch.Size] = {}
        offsets: dict[str, int] = {}
        end = 0
        dtype: torch.dtype | None = None
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            dtype = dtype or parameter.dtype
            if not parameter.dtype.is_floating_point:
                raise FusionError(f"parameter {name} is {parameter.dtype}; lanes need a floating-point type")
            if parameter.dtype != dtype:
                raise FusionError(
                    f"parameter {name} is {parameter.dtype}, others are {dtype}: lanes need one floating-point type; "
                    "convert the model with .to(torch.float32) in build(width)"
                )
            shapes[name], offsets[name] = parameter.shape, end
            end += _align(parameter.numel(), PARAMETER_ALIGNMENT)
        if dtype is None:
            raise FusionError("the model has no parameter that requires a gradient; there is nothing to train")
        return cls(shapes, offsets, _align(end, ROW_ALIGNMENT), dtype)

    def views(self, flat_FP: Tensor) -> dict[str, Tensor]:
        """Each parameter as a view (F, *shape) into the flat matrix."""
        num_lanes = flat_FP.shape[0]
        return {
            name: flat_FP[:, self.offsets[name] : self.offsets[name] + shape.numel()].view(num_lanes, *shape)
            for name, shape in self.shapes.items()
        }

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """One lane's parameters as a row of shape (P,); gaps are zero.

        Raises:
            FusionError: A parameter is missing or has another shape.
        """
        row_P = torch.zeros(self.row_size, dtype=self.dtype)  # on the CPU, where checkpoints and new lanes come from
        for name, shape in self.shapes.items():
            value = values.get(name)
            if value is None or value.shape != shape:
                found = "nothing" if value is None else f"shape {tuple(value.shape)}"
                raise FusionError(f"parameter {name}: got {found}, needed shape {tuple(shape)}; is this another model?")
            row_P[self.offsets[name] : self.offsets[name] + shape.numel()] = value.detach().reshape(-1)
        return row_P

    def unpack(self, row_P: Tensor) -> dict[str, Tensor]:
        """Copies of one lane's parameters, by name."""
        return {
            name: row_P[self.offsets[name] : self.offsets[name] + shape.numel()].reshape(shape).clone()
            for name, shape in self.shapes.items()
        }

    def spread(self, factors: Mapping[str, float]) -> Tensor | None:
        """One factor per parameter as a row (P,); None where all are 1."""
        if all(factor == 1 for factor in factors.values()):
            return None
        row_P = torch.ones(self.row_size, dtype=self.dtype)
        for name, shape in self.shapes.items():
            row_P[self.offsets[name] : self.offsets[name] + shape.numel()] = factors[name]
        return row_P

    def gaps(self) -> list[int]:
        """Unused values after each parameter."""
        bounds = [*self.offsets.values(), self.row_size]
        sizes = [shape.numel() for shape in self.shapes.values()]
        return [end - start - size for (start, end), size in zip(pairwise(bounds), sizes, strict=True)]


def _align(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
