"""Where the lanes of a value lie in its tensor, and how values meet that have them in different places.

A value without a trace of any parameter is *shared*: one tensor stands for all lanes. What a convolution, a pooling or
a batch norm works on is *folded*: lanes are blocks of channels, so that one grouped kernel does all lanes. Everything
else is *lane-major*. Lane-major is a view of folded; the way back copies, unless the memory has stayed as it was.

Shape suffixes: F = lanes, B = samples per lane (or whatever a lane's first dimension is), C = channels of one lane.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hydro_slurm.errors import FusionError

SHARED, LANE_MAJOR, FOLDED = range(3)
"""Layouts of a lane's (B, C, ...): (B, C, ...) itself, (F, B, C, ...), (B, F*C, ...)."""


class Value:
    """A tensor of all lanes.

    Args:
        tensor: What holds the numbers.
        layout: Where its lanes are.
        num_lanes: How many there are.
    """

    __slots__ = ("layout", "num_lanes", "tensor")

    def __init__(self, tensor: Tensor, layout: int, num_lanes: int) -> None:
        self.tensor, self.layout, self.num_lanes = tensor, layout, num_lanes

    @property
    def rank(self) -> int:
        """Dimensions of one lane's tensor."""
        return self.tensor.dim() - (self.layout == LANE_MAJOR)

    @property
    def shape(self) -> torch.Size:
        """The shape of one lane's tensor: what a model may see."""
        shape = self.tensor.shape
        if self.layout == SHARED:
            return shape
        if self.layout == LANE_MAJOR:
            return shape[1:]
        return torch.Size((shape[0], shape[1] // self.num_lanes, *shape[2:]))

    def lanes(self) -> Tensor:
        """Shape (F, B, C, ...); a view."""
        if self.layout == LANE_MAJOR:
            return self.tensor
        if self.layout == SHARED:
            return self.tensor.expand(self.num_lanes, *self.tensor.shape)
        shape = self.tensor.shape
        return self.tensor.view(shape[0], self.num_lanes, shape[1] // self.num_lanes, *shape[2:]).transpose(0, 1)

    def folded(self) -> Tensor:
        """Shape (B, F*C, ...). The value keeps the copy that this may need, for whoever asks next.

        Raises:
            FusionError: A lane's tensor has no dimension of channels.
        """
        if self.layout == FOLDED:
            return self.tensor
        if self.rank < 2:
            raise FusionError(f"a lane's tensor has shape {tuple(self.shape)}, needed samples and channels")
        self.tensor = self.lanes().transpose(0, 1).flatten(1, 2)
        self.layout = FOLDED
        return self.tensor

    def with_rank(self, rank: int) -> Tensor:
        """Lane-major with dimensions of size 1 before a lane's own, as broadcasting has it; shared stays shared."""
        if self.layout == SHARED:
            return self.tensor
        tensor_F = self.lanes()
        missing = rank + 1 - tensor_F.dim()
        if missing <= 0:
            return tensor_F
        return tensor_F.reshape(tensor_F.shape[0], *[1] * missing, *tensor_F.shape[1:])


def dim_of(value: Value, dim: int, *, new: bool = False) -> int:
    """A lane's dimension as one of the lane-major tensor.

    Args:
        value: The value.
        dim: As the model says it; negative ones count from the end.
        new: The dimension is about to be inserted.

    Raises:
        IndexError: A lane's tensor has no such dimension (the lane-major one might).
    """
    rank = value.rank + new
    if not -rank <= dim < rank:
        raise IndexError(f"dimension {dim} of a lane's tensor of shape {tuple(value.shape)}")
    return dim % rank + 1


def aligned(values: Sequence[Value]) -> tuple[list[Tensor], int]:
    """Tensors that broadcast as the lanes' own would, and the layout of what an elementwise function makes of them."""
    layout = values[0].layout
    if all(value.layout == layout for value in values):
        if layout == SHARED:
            return [value.tensor for value in values], SHARED
        size = values[0].tensor.dim()
        if all(value.tensor.dim() == size for value in values) and (layout == LANE_MAJOR or _same_channels(values)):
            return [value.tensor for value in values], layout
    rank = max(value.rank for value in values)
    folded = [value for value in values if value.layout == FOLDED]
    if folded and all(value.rank == rank for value in folded) and _same_channels(folded):
        channels = folded[0].tensor.shape[1] // folded[0].num_lanes
        fitting = [_fitted(value, rank, channels) for value in values]
        tensors = [tensor for tensor in fitting if tensor is not None]
        if len(tensors) == len(values):
            return tensors, FOLDED
    return _scalars_cast(values, [value.with_rank(rank) for value in values]), LANE_MAJOR


def _same_channels(values: Sequence[Value]) -> bool:
    channels = values[0].tensor.shape[1]
    return all(value.tensor.shape[1] == channels for value in values)


def _fitted(value: Value, rank: int, channels: int) -> Tensor | None:
    """The value as it broadcasts against a folded one; None where that would need a large copy or cannot be."""
    if value.layout == FOLDED:
        return value.tensor
    shape = (*[1] * (rank - value.rank), *value.shape)
    if value.layout == SHARED:
        if shape[1] == 1:
            return value.tensor
        if shape[1] != channels:
            return None
        return value.tensor.reshape(shape).repeat(1, value.num_lanes, *[1] * (rank - 2))
    if shape[0] != 1 or shape[1] != channels:
        return None
    return value.tensor.reshape(1, value.num_lanes * channels, *shape[2:])


def _scalars_cast(values: Sequence[Value], tensors: list[Tensor]) -> list[Tensor]:
    """A lane's tensor without dimensions does not promote the others' type; with a dimension of lanes it would."""
    others = [tensor for value, tensor in zip(values, tensors, strict=True) if value.rank > 0]
    if not others or len(others) == len(values):
        return tensors
    dtype = others[0].dtype
    for other in others[1:]:
        dtype = torch.promote_types(dtype, other.dtype)
    like = torch.empty(1, dtype=dtype)
    return [
        tensor if value.rank > 0 else tensor.to(torch.result_type(like, torch.empty((), dtype=tensor.dtype)))
        for value, tensor in zip(values, tensors, strict=True)
    ]
