"""What F lanes see in one forward pass.

Shape suffixes: F = lanes, B = samples per lane (of the lane with most samples, where lanes differ).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

Tree = Any
"""A tensor, or tuples, lists and dicts of tensors."""


@dataclass(frozen=True)
class LaneBatch:
    """Samples of all lanes."""

    x: Tree
    """Inputs, each tensor (F, B, ...), or (B, ...) where all lanes share them."""
    y: Tree
    """Targets, likewise."""
    shared: bool
    """Whether all lanes see the same samples: `x` and `y` then have no dimension of lanes."""
    seeds: tuple[int, ...]
    """One per lane: what its random draws in this step derive from."""
    weights_FB: Tensor | None = None  # noqa: N815
    """Weight of each sample in its lane's loss, 0 for padding; None where every lane has B samples."""

    @property
    def num_lanes(self) -> int:
        return len(self.seeds)

    def of_lane(self, row: int) -> tuple[Tree, Tree]:
        """One lane's own samples, without padding."""
        if self.shared:
            return self.x, self.y
        num_samples: int | None = None
        if self.weights_FB is not None:
            num_samples = int(self.weights_FB[row].count_nonzero())
        return tree_map(lambda t: t[row, :num_samples], self.x), tree_map(lambda t: t[row, :num_samples], self.y)


def call_model(model: Callable[..., Any], x: Tree) -> Any:
    """Call a model with its inputs: a dict gives keyword arguments, a tuple positional ones, a tensor the only one."""
    if isinstance(x, dict):
        return model(**x)
    if isinstance(x, (tuple, list)):
        return model(*x)
    return model(x)


def num_samples(x: Tree) -> int:
    """The size of the first dimension of the first tensor."""
    return len(tree_leaves(x)[0])


def take(tree: Tree, index: Tensor) -> Tree:
    """Samples by their numbers; `index` may have any shape, which replaces the first dimension."""
    return tree_map(lambda t: t.index_select(0, index.reshape(-1).to(t.device)).view(*index.shape, *t.shape[1:]), tree)


def in_chunks(tree: Tree, size: int) -> Iterator[Tree]:
    """Parts of `size` samples, the last one shorter."""
    for start in range(0, num_samples(tree), size):
        yield tree_map(lambda leaf, start=start: leaf[start : start + size], tree)


def concatenate(parts: list[Tree], dim: int) -> Tree:
    """Join trees of tensors leaf by leaf. What is no tensor is taken from the first."""
    leaves, spec = tree_flatten(parts[0])
    columns = zip(*(tree_leaves(part) for part in parts), strict=True)
    joined = [
        torch.cat(list(column), dim=dim) if isinstance(leaf, Tensor) else leaf
        for leaf, column in zip(leaves, columns, strict=True)
    ]
    return tree_unflatten(joined, spec)
