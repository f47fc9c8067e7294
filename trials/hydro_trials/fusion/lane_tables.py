"""Which handler stands for which function, tensor method and operator.

What is in no table is refused: that a model runs by batched kernels is never a guess.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from hydro_slurm.errors import FusionError
from hydro_trials.fusion import lane_layers as layers
from hydro_trials.fusion import lane_ops as ops
from hydro_trials.fusion.folding import Value
from hydro_trials.fusion.lane_ops import Handler, Pass, by_vmap, elementwise, only_shared, words

_UNARY = words(
    "abs acos asin atan bitwise_not ceil clamp cos cosh erf exp expm1 floor isfinite isinf isnan log log10 log1p log2 "
    "logical_not logit nan_to_num neg reciprocal relu round rsqrt sigmoid sign sin sinh sqrt square tan tanh"
)
_BINARY = words(
    "add atan2 div eq floor_divide fmod ge gt le logical_and logical_or logical_xor lt masked_fill maximum minimum mul "
    "ne pow remainder sub true_divide where"
)
_ACTIVATIONS = words(
    "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 selu sigmoid silu "
    "softplus softshrink softsign tanh tanhshrink threshold"
)
_OPERATORS = words("add and_ eq floordiv ge gt invert le lt mod mul ne neg or_ pow sub truediv xor")
_IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ipow")
_BY_VMAP = words(
    "argmax argmin cumprod cumsum diagonal einsum flip gather index_select logsumexp max min movedim narrow norm outer "
    "prod repeat_interleave roll select std swapaxes tile topk tril triu var"
)
_METHODS_BY_VMAP = [name for name in _BY_VMAP if name not in ("einsum", "tile")] + ["repeat", "tile"]
_POOLS = {
    f"{kind}{dims}d": dims
    for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
    for dims in (1, 2, 3)
}
_CASTS = ("bfloat16", "bool", "contiguous", "clone", "cpu", "detach", "double", "float", "half", "int", "long", "to")
_CREATE = ("arange", "empty", "eye", "full", "linspace", "ones", "zeros")
_LIKE = ("full_like", "ones_like", "zeros_like")


def _method(name: str) -> Callable[..., Any]:
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(x, name)(*args, **kwargs)

    return call


def _in_place(function: Callable[..., Any]) -> Handler:
    """Out of place, with the type and the shape of the first tensor; tracing has seen that nothing else looks at it."""
    of_lanes = elementwise(function)

    def call(run: Pass, x: Any, *args: Any, **kwargs: Any) -> Any:
        y = of_lanes(run, x, *args, **kwargs)
        if type(x) is not Value:
            return y
        if y.shape != x.shape:
            raise FusionError(f"an operation in place makes {tuple(y.shape)} of {tuple(x.shape)}")
        if y.tensor.dtype != x.tensor.dtype:
            y.tensor = y.tensor.to(x.tensor.dtype)
        return y

    return call


def _cast(name: str) -> Handler:
    def function(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("memory_format", None)  # lanes have their own
        if name == "contiguous":
            return x
        if args and isinstance(args[0], Tensor):
            args = (args[0].dtype, *args[1:])
        y: Tensor = getattr(x, name)(*args, **kwargs)
        return y

    def call(run: Pass, x: Value, *args: Any, **kwargs: Any) -> Value:
        plain = [arg.tensor if type(arg) is Value else arg for arg in args]
        return Value(function(x.tensor, *plain, **kwargs), x.layout, x.num_lanes)

    return call


def _plain_pool(name: str) -> Handler:
    function = getattr(F, name)

    def call(run: Pass, x: Value, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("return_indices"):
            raise FusionError(f"{name} with return_indices")
        return folded(run, x, *args, **kwargs)

    folded = layers.folded(function, _POOLS[name])
    return call


def _interpolate(run: Pass, input: Value, *args: Any, **kwargs: Any) -> Value:  # noqa: A002
    result: Value = layers.folded(F.interpolate, input.rank - 2)(run, input, *args, **kwargs)
    return result


def _new(name: str) -> Handler:
    def call(run: Pass, x: Value, *args: Any, **kwargs: Any) -> Value:
        return ops.created(getattr(x.tensor, name))(run, *args, **kwargs)  # type: ignore[no-any-return]

    return call


_SHARED_NAMES: dict[str, Handler] = {
    "flatten": ops.flatten,
    "unflatten": ops.unflatten,
    "reshape": ops.reshape,
    "transpose": only_shared(torch.transpose, ops.transpose),
    "permute": only_shared(_method("permute"), ops.permute),
    "unsqueeze": only_shared(torch.unsqueeze, ops.unsqueeze),
    "squeeze": only_shared(torch.squeeze, ops.squeeze),
    "chunk": ops.pieces(torch.chunk),
    "split": ops.pieces(torch.split),
    "unbind": only_shared(torch.unbind, ops.unbind),
    "matmul": only_shared(torch.matmul, ops.matmul),
    "bmm": only_shared(torch.bmm, ops.matmul),
    "mm": only_shared(torch.mm, ops.matmul),
    "softmax": ops.along(torch.softmax),
    "log_softmax": ops.along(torch.log_softmax),
    **{name: ops.reduction(getattr(torch, name)) for name in ("mean", "sum", "amax", "amin")},
}

FUNCTIONS: dict[Callable[..., Any], Handler] = {
    **{getattr(torch, name): elementwise(getattr(torch, name)) for name in (*_UNARY, *_BINARY, *_LIKE)},
    **{getattr(F, name): elementwise(getattr(F, name)) for name in _ACTIVATIONS},
    **{getattr(operator, name): elementwise(getattr(operator, name)) for name in _OPERATORS},
    **{getattr(operator, name): _in_place(getattr(operator, name[1:])) for name in _IN_PLACE_OPERATORS},
    **{getattr(torch, name): only_shared(getattr(torch, name), by_vmap(getattr(torch, name))) for name in _BY_VMAP},
    **{getattr(torch, name): ops.created(getattr(torch, name)) for name in _CREATE},
    **{getattr(torch, name): handler for name, handler in _SHARED_NAMES.items()},
    **{getattr(F, name): _plain_pool(name) for name in _POOLS},
    **{getattr(math, name): ops.of_numbers(getattr(math, name)) for name in dir(math) if callable(getattr(math, name))},
    torch.relu_: _in_place(torch.relu),
    F.softmax: ops.along(torch.softmax),
    F.log_softmax: ops.along(torch.log_softmax),
    F.normalize: only_shared(F.normalize, by_vmap(F.normalize)),
    F.one_hot: only_shared(F.one_hot, by_vmap(F.one_hot)),
    F.pixel_shuffle: only_shared(F.pixel_shuffle, by_vmap(F.pixel_shuffle)),
    F.glu: only_shared(F.glu, by_vmap(F.glu)),
    F.interpolate: _interpolate,
    F.pad: only_shared(F.pad, layers.pad),
    F.linear: only_shared(F.linear, layers.linear),
    F.embedding: layers.embedding,
    F.layer_norm: layers.layer_norm,
    F.rms_norm: layers.rms_norm,
    F.group_norm: layers.group_norm,
    F.scaled_dot_product_attention: layers.attention,
    F.dropout: layers.dropout(),
    torch.dropout: layers.dropout(),
    F.dropout1d: layers.dropout(2),
    F.dropout2d: layers.dropout(2),
    F.dropout3d: layers.dropout(2, unbatched=4),
    F.alpha_dropout: layers.dropout(alpha=True),
    F.feature_alpha_dropout: layers.dropout(2, alpha=True),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), layers.convolution),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), layers.transposed_convolution),
    **dict.fromkeys((torch.cat, torch.concat), only_shared(torch.cat, ops.concatenated)),
    torch.stack: only_shared(torch.stack, ops.stacked),
    torch._assert: ops.assertion,
    operator.getitem: ops.getitem,
    operator.matmul: only_shared(torch.matmul, ops.matmul),
    getattr: ops.attribute,
}
"""By function."""

METHODS: dict[str, Handler] = {
    **{name: elementwise(_method(name)) for name in (*_UNARY, *[n for n in _BINARY if n != "where"])},
    **{name + "_": _in_place(_method(name)) for name in (*_UNARY, *[n for n in _BINARY if n != "where"])},
    **{name: only_shared(_method(name), by_vmap(_method(name))) for name in _METHODS_BY_VMAP},
    **{name: _cast(name) for name in _CASTS},
    **{f"new_{name}": _new(f"new_{name}") for name in ("empty", "full", "ones", "zeros", "tensor")},
    **_SHARED_NAMES,
    "type_as": _cast("type_as"),
    "view": ops.reshape,
    "expand": only_shared(_method("expand"), ops.expand),
    "t": only_shared(_method("t"), ops.swapped),
    "size": ops.size_of,
    "dim": lambda run, x: x.rank,
    "numel": lambda run, x: x.shape.numel(),
}
"""By name of the method."""

ATTRIBUTES = ("shape", "ndim", "dtype", "device", "T", "mT")
"""What a model may read of a tensor."""

DRAWS = {F.dropout, torch.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
DRAWS |= {F.scaled_dot_product_attention}
"""Functions that may draw random numbers."""

FRESH_FUNCTIONS = {
    *(getattr(torch, name) for name in (*_UNARY, *_BINARY, "cat", "matmul", "bmm", "stack")),
    *(getattr(F, name) for name in _ACTIVATIONS),
    *(getattr(operator, name) for name in (*_OPERATORS, *_IN_PLACE_OPERATORS, "matmul")),
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.layer_norm, F.rms_norm, F.group_norm, F.embedding),
}
"""Functions whose result never shares memory with an argument."""


def reads_shape(node: fx.Node) -> bool:
    """Whether a call looks at its argument's shape, type or place alone."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.target is getattr and node.args[1] not in ("T", "mT")


def is_in_place(target: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call writes to its first argument."""
    if kwargs.get("inplace"):
        return True
    if isinstance(target, str):
        return target.endswith("_")
    return target in (torch.relu_, *(getattr(operator, name) for name in _IN_PLACE_OPERATORS))
