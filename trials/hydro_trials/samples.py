"""Samples: tensors, or several in tuples, lists and dicts, whose first dimension is the sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

Tree = Any
"""A tensor, or tuples, lists and dicts of tensors."""


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


def first(tree: Tree, count: int) -> Tree:
    """The first samples."""
    return tree_map(lambda leaf: leaf[:count], tree)


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
