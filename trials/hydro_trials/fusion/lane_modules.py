"""Which handler stands for which module of torch.nn, of exactly that type.

Shape suffixes: F = lanes, C = channels of one lane.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hydro_slurm.errors import FusionError
from hydro_trials.fusion import kernels
from hydro_trials.fusion import lane_layers as layers
from hydro_trials.fusion import lane_ops as ops
from hydro_trials.fusion.folding import SHARED, Value
from hydro_trials.fusion.lane_ops import Handler, Pass, elementwise, only_shared, words

Names = dict[str, str]
"""Of a module's own parameters and buffers: local name to the name in the pass's state."""

Maker = Callable[[Any, Names], Handler]


def _value(run: Pass, names: Names, name: str) -> Value | None:
    return run.value(names[name]) if name in names else None


def _linear(module: nn.Linear, names: Names) -> Handler:
    return lambda run, x: layers.linear(run, x, run.value(names["weight"]), _value(run, names, "bias"))


def _convolution(module: Any, names: Names) -> Handler:
    options = {"stride": module.stride, "dilation": module.dilation, "groups": module.groups}
    options["padding"] = module.padding if module.padding_mode == "zeros" else 0
    around, mode = module._reversed_padding_repeated_twice, module.padding_mode

    def call(run: Pass, x: Value) -> Value:
        if mode != "zeros":
            x = only_shared(F.pad, layers.pad)(run, x, around, mode)
        return layers.convolution(run, x, run.value(names["weight"]), _value(run, names, "bias"), **options)

    return call


def _transposed(module: Any, names: Names) -> Handler:
    names_of_options = ("stride", "padding", "output_padding", "groups", "dilation")
    options = {name: getattr(module, name) for name in names_of_options}
    return lambda run, x: layers.transposed_convolution(
        run, x, run.value(names["weight"]), _value(run, names, "bias"), **options
    )


def _batch_norm(num_ranks: tuple[int, ...]) -> Maker:
    def make(module: Any, names: Names) -> Handler:
        is_training = module.training  # a model may hold it in evaluation mode while it trains

        def call(run: Pass, x: Value) -> Value:
            if x.rank not in num_ranks:
                raise FusionError(f"{type(module).__name__} got {x.rank} dimensions, needed {num_ranks}")
            momentum = module.momentum
            trains = run.training and is_training
            uses_batch = trains or module.running_mean is None
            if trains and "num_batches_tracked" in names:
                num_F = run.state[names["num_batches_tracked"]]
                num_F.add_(1)
                if momentum is None:
                    momentum = 1.0 / num_F.double()
            tensors = [None if t is None else t.lanes() for t in (_value(run, names, name) for name in _MOMENTS)]
            is_shared = x.layout == SHARED
            x_BC = Value(x.tensor, x.layout, x.num_lanes).folded() if is_shared else x.folded()
            return run.fold(
                kernels.batch_norm(x_BC, *tensors, uses_batch=uses_batch, momentum=momentum, eps=module.eps)
            )

        return call

    return make


_MOMENTS = ("running_mean", "running_var", "weight", "bias")


def _group_norm(module: nn.GroupNorm, names: Names) -> Handler:
    return lambda run, x: layers.group_norm(
        run, x, module.num_groups, _value(run, names, "weight"), _value(run, names, "bias"), module.eps
    )


def _layer_norm(module: nn.LayerNorm, names: Names) -> Handler:
    return lambda run, x: layers.layer_norm(
        run, x, module.normalized_shape, _value(run, names, "weight"), _value(run, names, "bias"), module.eps
    )


def _rms_norm(module: nn.RMSNorm, names: Names) -> Handler:
    return lambda run, x: layers.rms_norm(run, x, module.normalized_shape, _value(run, names, "weight"), module.eps)


def _embedding(module: nn.Embedding, names: Names) -> Handler:
    options = (module.padding_idx, module.max_norm, module.norm_type, module.scale_grad_by_freq, module.sparse)
    return lambda run, x: layers.embedding(run, x, run.value(names["weight"]), *options)


def _prelu(module: nn.PReLU, names: Names) -> Handler:
    def call(run: Pass, x: Value) -> Value:
        slope = run.value(names["weight"])
        if x.rank > 1 and module.num_parameters > 1:  # one slope per channel
            slope = run.major(slope.lanes().reshape(slope.num_lanes, -1, *[1] * (x.rank - 2)))
        return elementwise(_leaky)(run, x, slope)  # type: ignore[no-any-return]

    return call


def _leaky(x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, slope * x)


def _dropout(handler: Handler) -> Maker:
    def make(module: Any, names: Names) -> Handler:
        is_training = module.training
        return lambda run, x: handler(run, x, module.p, run.training and is_training)

    return make


def _same(module: nn.Module, names: Names) -> Handler:
    return lambda run, x: x


def _pool(num_dims: int) -> Maker:
    def make(module: Any, names: Names) -> Handler:
        if getattr(module, "return_indices", False):
            raise FusionError(f"{type(module).__name__} with return_indices")
        return layers.folded(module.forward, num_dims)

    return make


def _by_itself(module: Any, names: Names) -> Handler:
    """An elementwise module without parameters or random draws."""
    if getattr(module, "inplace", False):
        module = copy.copy(module)
        module.inplace = False  # tracing has seen that nothing else looks at the input
    return elementwise(module.forward)


_ELEMENTWISE = words(
    "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish ReLU ReLU6 SELU Sigmoid SiLU "
    "Softplus Softshrink Softsign Tanh Tanhshrink Threshold"
)
_POOLS = ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool")

MODULES: dict[type[nn.Module], Maker] = {
    nn.Linear: _linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed),
    nn.BatchNorm1d: _batch_norm((2, 3)),
    nn.BatchNorm2d: _batch_norm((4,)),
    nn.BatchNorm3d: _batch_norm((5,)),
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.Embedding: _embedding,
    nn.PReLU: _prelu,
    nn.Identity: _same,
    nn.Dropout: _dropout(layers.dropout()),
    **dict.fromkeys((nn.Dropout1d, nn.Dropout2d), _dropout(layers.dropout(2))),
    nn.Dropout3d: _dropout(layers.dropout(2, unbatched=4)),
    nn.AlphaDropout: _dropout(layers.dropout(alpha=True)),
    nn.FeatureAlphaDropout: _dropout(layers.dropout(2, alpha=True)),
    nn.Flatten: lambda module, names: lambda run, x: ops.flatten(run, x, module.start_dim, module.end_dim),
    nn.Unflatten: lambda module, names: lambda run, x: ops.unflatten(run, x, module.dim, module.unflattened_size),
    nn.Softmax: lambda module, names: lambda run, x: ops.along(torch.softmax)(run, x, module.dim),
    nn.LogSoftmax: lambda module, names: lambda run, x: ops.along(torch.log_softmax)(run, x, module.dim),
    nn.Upsample: lambda module, names: lambda run, x: layers.folded(module.forward, x.rank - 2)(run, x),
    nn.PixelShuffle: lambda module, names: only_shared(module.forward, ops.by_vmap(module.forward)),
    **{getattr(nn, name): _by_itself for name in _ELEMENTWISE},
    **{getattr(nn, f"{kind}{dims}d"): _pool(dims) for kind in _POOLS for dims in (1, 2, 3)},
}
"""By type."""

DRAWING_MODULES = {nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout}
"""Modules that draw random numbers in training."""

ALIASING_MODULES = {*DRAWING_MODULES, nn.Identity, nn.Flatten, nn.Unflatten}
"""Modules whose result may share memory with their input."""
