"""Functions and tensor methods of torch on values of all lanes: what a model calls outside its modules.

Every handler takes the pass that it belongs to, then what the function takes, with a `Value` for each tensor.

Shape suffixes: F = lanes, B = samples per lane.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from hydro_slurm.errors import FusionError
from hydro_trials.fusion.folding import FOLDED, LANE_MAJOR, SHARED, Value, aligned, dim_of
from hydro_trials.fusion.randomness import LaneGenerators

Handler = Callable[..., Any]


class Pass:
    """One forward pass of all lanes.

    Args:
        state: Parameters and buffers by name.
        num_lanes: How many lanes.
        generators: The lanes' own, seeded.
        check: Asked at the boundaries.
        training: Whether samples are trained on.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        num_lanes: int,
        generators: LaneGenerators,
        check: Callable[[int], None],
        *,
        training: bool,
    ) -> None:
        self.state, self.num_lanes, self.generators = state, num_lanes, generators
        self.check, self.training = check, training

    def value(self, name: str) -> Value:
        """A parameter or buffer of the lanes."""
        return Value(self.state[name], LANE_MAJOR, self.num_lanes)

    def major(self, tensor: Tensor) -> Value:
        """A lane-major value."""
        return Value(tensor, LANE_MAJOR, self.num_lanes)

    def fold(self, tensor: Tensor) -> Value:
        """A folded value."""
        return Value(tensor, FOLDED, self.num_lanes)

    def noise(self, shape: list[int], like: Tensor, keep: float) -> Tensor:
        """Zeros and ones (F, *shape), each lane's drawn as the general path draws them."""
        lanes_F = torch.arange(self.num_lanes, device=like.device)
        drawn: Tensor = vmap(lambda lane: self.generators.noise(lane, shape, like, keep))(lanes_F)
        return drawn


def only_shared(function: Callable[..., Any], handler: Handler) -> Handler:
    """Where no argument differs between lanes, call the function itself; else the handler."""

    def call(run: Pass, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else None
        if type(first) is Value and first.layout != SHARED:
            return handler(run, *args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        if any(type(leaf) is Value and leaf.layout != SHARED for leaf in leaves):
            return handler(run, *args, **kwargs)
        plain = [leaf.tensor if type(leaf) is Value else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(plain, spec)
        return tree_map(
            lambda t: Value(t, SHARED, run.num_lanes) if isinstance(t, Tensor) else t, function(*args, **kwargs)
        )

    return call


def by_vmap(function: Callable[..., Any]) -> Handler:
    """Any pure function, by vmap of this one call."""

    def call(run: Pass, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if type(leaf) is Value]
        values = [leaves[place] for place in places]
        dims = tuple(None if value.layout == SHARED else 0 for value in values)
        tensors = [value.tensor if value.layout == SHARED else value.lanes() for value in values]

        def of_lane(*own: Tensor) -> Any:
            flat = list(leaves)
            for place, tensor in zip(places, own, strict=True):
                flat[place] = tensor
            own_args, own_kwargs = tree_unflatten(flat, spec)
            return function(*own_args, **own_kwargs)

        return tree_map(lambda t: run.major(t) if isinstance(t, Tensor) else t, vmap(of_lane, dims)(*tensors))

    return call


def elementwise(function: Callable[..., Any]) -> Handler:
    """A function that treats every position alike and broadcasts its tensors."""

    def call(run: Pass, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and type(args[0]) is Value:  # most activations
            x = args[0]
            return Value(function(x.tensor), x.layout, x.num_lanes)
        kwargs.pop("inplace", None)
        values = [arg for arg in args if type(arg) is Value]
        named = [key for key, arg in kwargs.items() if type(arg) is Value]
        values += [kwargs[key] for key in named]
        if not values:
            return function(*args, **kwargs)
        if len(values) == 1:
            tensors, layout = [values[0].tensor], values[0].layout
        else:
            tensors, layout = aligned(values)
        rest = iter(tensors)
        plain = [next(rest) if type(arg) is Value else arg for arg in args]
        for key in named:
            kwargs[key] = next(rest)
        return Value(function(*plain, **kwargs), layout, values[0].num_lanes)

    return call


def reduction(function: Callable[..., Tensor]) -> Handler:
    def call(run: Pass, x: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Value:
        x_F = x.lanes()
        if (dim is None or dim == ()) and keepdim:
            dim = range(x.rank)
        if dim is None or dim == ():
            return run.major(function(x_F.flatten(1) if x_F.dim() > 1 else x_F.unsqueeze(1), 1, **kwargs))
        dims = [dim_of(x, d) for d in ((dim,) if isinstance(dim, int) else dim)]
        if x.layout == FOLDED and 1 not in dims and 2 not in dims:  # positions only: lanes stay in the channels
            return run.fold(function(x.tensor, [d - 1 for d in dims], keepdim, **kwargs))
        return run.major(function(x_F, dims, keepdim, **kwargs))

    return only_shared(function, call)


def along(function: Callable[..., Tensor]) -> Handler:
    """A function along one dimension that keeps the shape."""

    def call(run: Pass, input: Value, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Value:  # noqa: A002
        return run.major(function(input.lanes(), dim_of(input, dim), dtype=dtype))

    return only_shared(function, call)


def _sizes(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        return tuple(sizes[0])
    if any(not isinstance(size, int) for size in sizes):
        raise FusionError(f"got sizes {sizes}, needed whole numbers")
    return sizes


def reshape(run: Pass, x: Value, *sizes: Any, shape: Any = None) -> Value:
    sizes = _sizes(sizes if shape is None else (shape,))
    if x.layout == SHARED:
        return Value(x.tensor.reshape(sizes), SHARED, x.num_lanes)
    x_F = x.lanes()
    return run.major(x_F.reshape(x_F.shape[0], *sizes))


def flatten(run: Pass, input: Value, start_dim: int = 0, end_dim: int = -1) -> Value:  # noqa: A002
    """Flatten; what is folded and keeps its samples stays so."""
    if input.layout == SHARED:
        return Value(input.tensor.flatten(start_dim, end_dim), SHARED, input.num_lanes)
    first, last = (dim_of(input, start_dim), dim_of(input, end_dim)) if input.rank else (0, 0)
    if input.layout == FOLDED and first == 2:
        return run.fold(input.tensor.flatten(1, last - 1))
    if input.rank == 0:
        return run.major(input.lanes().unsqueeze(1))
    return run.major(input.lanes().flatten(first, last))


def unflatten(run: Pass, input: Value, dim: int, sizes: Any) -> Value:  # noqa: A002
    """Unflatten one dimension."""
    if input.layout == SHARED:
        return Value(torch.unflatten(input.tensor, dim, sizes), SHARED, input.num_lanes)
    return run.major(torch.unflatten(input.lanes(), dim_of(input, dim), sizes))


def transpose(run: Pass, x: Value, dim0: int, dim1: int) -> Value:
    return run.major(x.lanes().transpose(dim_of(x, dim0), dim_of(x, dim1)))


def permute(run: Pass, x: Value, *dims: Any) -> Value:
    return run.major(x.lanes().permute(0, *(dim_of(x, d) for d in _sizes(dims))))


def unsqueeze(run: Pass, x: Value, dim: int) -> Value:
    return run.major(x.lanes().unsqueeze(dim_of(x, dim, new=True)))


def squeeze(run: Pass, x: Value, dim: Any = None) -> Value:
    dims = range(x.rank) if dim is None else (dim,) if isinstance(dim, int) else dim
    return run.major(x.lanes().squeeze(tuple(dim_of(x, d) for d in dims)))


def expand(run: Pass, x: Value, *sizes: Any) -> Value:
    sizes = _sizes(sizes)
    return run.major(x.with_rank(len(sizes)).expand(x.num_lanes, *sizes))


def swapped(run: Pass, x: Value) -> Value:
    return run.major(x.lanes().transpose(dim_of(x, -2), dim_of(x, -1)))


def pieces(function: Callable[..., Any]) -> Handler:
    def call(run: Pass, x: Value, size: Any, dim: int = 0) -> tuple[Value, ...]:
        return tuple(run.major(part) for part in function(x.lanes(), size, dim_of(x, dim)))

    return only_shared(function, call)


def unbind(run: Pass, x: Value, dim: int = 0) -> tuple[Value, ...]:
    return tuple(run.major(part) for part in x.lanes().unbind(dim_of(x, dim)))


def concatenated(run: Pass, tensors: Any, dim: int = 0) -> Value:
    values = list(tensors)
    folds = all(value.layout == FOLDED for value in values)
    if folds and dim_of(values[0], dim) == 2:
        split = [value.lanes().transpose(0, 1) for value in values]
        return run.fold(torch.cat(split, 2).flatten(1, 2))
    return run.major(torch.cat([value.lanes() for value in values], dim_of(values[0], dim)))


def stacked(run: Pass, tensors: Any, dim: int = 0) -> Value:
    values = list(tensors)
    return run.major(torch.stack([value.lanes() for value in values], dim_of(values[0], dim, new=True)))


def getitem(run: Pass, container: Any, index: Any) -> Any:
    """An item of a tuple or dict, or part of a tensor.

    Raises:
        FusionError: The index is a mask: what it selects differs in size from lane to lane.
    """
    if type(container) is not Value:
        return container[index]
    parts = index if isinstance(index, tuple) else (index,)
    tensors = [part for part in parts if type(part) is Value]
    if any(value.tensor.dtype in (torch.bool, torch.uint8) for value in tensors):
        raise FusionError("indexing by a mask gives each lane another shape; use torch.where")
    if tensors or (len(parts) > 1 and any(isinstance(part, list) for part in parts)):
        return only_shared(_item, by_vmap(_item))(run, container, index)
    if container.layout == SHARED:
        return Value(container.tensor[index], SHARED, container.num_lanes)
    return run.major(container.lanes()[(slice(None), *parts)])


def _item(container: Tensor, index: Any) -> Tensor:
    return container[index]


def attribute(run: Pass, x: Any, name: str) -> Any:
    """Shape, type or place of one lane's tensor."""
    if name in ("T", "mT"):
        if name == "T" and x.rank != 2:
            raise FusionError(f".T of a lane's tensor with {x.rank} dimensions; use permute")
        return swapped(run, x)
    if name == "ndim":
        return x.rank
    return x.shape if name == "shape" else getattr(x.tensor, name)


def size_of(run: Pass, x: Value, dim: int | None = None) -> Any:
    return x.shape if dim is None else x.shape[dim]


def matmul(run: Pass, a: Value, b: Value) -> Value:
    if a.rank < 2 or b.rank < 2:
        vmapped: Value = by_vmap(torch.matmul)(run, a, b)
        return vmapped
    rank = max(a.rank, b.rank)
    return run.major(torch.matmul(a.with_rank(rank), b.with_rank(rank)))


def assertion(run: Pass, condition: Any, message: str = "") -> None:
    """An assert on shapes, as tracing leaves it."""
    if not condition:
        raise AssertionError(message)


def of_numbers(function: Callable[..., Any]) -> Handler:
    """A function that would read a tensor's values: lanes have different ones."""

    def call(run: Pass, *args: Any, **kwargs: Any) -> Any:
        if any(type(arg) is Value for arg in args):
            raise FusionError(f"{function.__name__} of a tensor's value, which differs from lane to lane")
        return function(*args, **kwargs)

    return call


def created(function: Callable[..., Tensor]) -> Handler:
    """A new tensor, the same for all lanes."""

    def call(run: Pass, *args: Any, **kwargs: Any) -> Value:
        return Value(function(*args, **kwargs), SHARED, run.num_lanes)

    return call


def words(text: str) -> list[str]:
    """Names in a row."""
    return text.split()
