"""Layers on values of all lanes: each brings its input into the layout that its kernel wants.

Every handler takes the pass that it belongs to, then what the function of torch takes.

Shape suffixes: F = lanes, B = samples per lane, I/O = in/out features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from hydro_slurm.errors import FusionError
from hydro_trials.fusion import kernels
from hydro_trials.fusion.folding import SHARED, Value
from hydro_trials.fusion.lane_ops import Handler, Pass, by_vmap, only_shared
from hydro_trials.fusion.randomness import dropped


def linear(run: Pass, input: Value, weight: Value, bias: Value | None = None) -> Value:  # noqa: A002
    """F.linear."""
    w_FOI, b_FO = weight.lanes(), None if bias is None else bias.lanes()
    if input.rank == 1:
        return run.major(kernels.linear(input.lanes().unsqueeze(1), w_FOI, b_FO).squeeze(1))
    return run.major(kernels.linear(input.lanes(), w_FOI, b_FO))


def convolution(run: Pass, input: Value, weight: Value, bias: Value | None = None, *args: Any, **kwargs: Any) -> Value:  # noqa: A002
    """F.conv1d, 2d, 3d: stride, padding, dilation, groups follow."""
    options = {**dict(zip(("stride", "padding", "dilation", "groups"), args, strict=False)), **kwargs}
    shared = input.layout == SHARED and options.get("groups", 1) == 1
    x = input.tensor if shared else _folded(input)
    return run.fold(
        kernels.convolution(x, weight.lanes(), None if bias is None else bias.lanes(), shared=shared, **options)
    )


def _folded(value: Value) -> Tensor:
    """The folded tensor; a shared value stays as it is for who needs it so."""
    return Value(value.tensor, SHARED, value.num_lanes).folded() if value.layout == SHARED else value.folded()


def transposed_convolution(
    run: Pass,
    input: Value,  # noqa: A002
    weight: Value,
    bias: Value | None = None,
    *args: Any,
    **kwargs: Any,
) -> Value:
    """F.conv_transpose1d, 2d, 3d: stride, padding, output padding, groups, dilation follow."""
    names = ("stride", "padding", "output_padding", "groups", "dilation")
    options = {**dict(zip(names, args, strict=False)), **kwargs}
    b_FO = None if bias is None else bias.lanes()
    return run.fold(kernels.transposed_convolution(_folded(input), weight.lanes(), b_FO, **options))


def folded(function: Callable[..., Any], num_dims: int) -> Handler:
    """Pooling and the like: a function of each channel alone, of samples with channels and `num_dims` more."""

    def call(run: Pass, x: Value, *args: Any, **kwargs: Any) -> Value:
        if x.rank != num_dims + 2:
            raise FusionError(f"a lane's tensor has {x.rank} dimensions, needed {num_dims + 2}")
        kwargs.pop("inplace", None)
        return run.fold(function(x.folded(), *args, **kwargs))

    return only_shared(function, call)


def pad(run: Pass, input: Value, pad: Any, mode: str = "constant", value: float | None = None) -> Value:  # noqa: A002
    """F.pad: positions in the layout that there is, anything else lane-major."""
    if input.rank < 2:
        vmapped: Value = by_vmap(F.pad)(run, input, pad, mode, value)
        return vmapped
    if len(pad) // 2 > input.rank - 2:
        if mode != "constant":
            raise FusionError(f"padding of mode {mode} on a lane's samples or channels")
        return run.major(F.pad(input.lanes(), pad, mode, value))
    return run.fold(F.pad(input.folded(), pad, mode, value))


def dropout(num_kept_dims: int | None = None, *, alpha: bool = False, unbatched: int = 2) -> Handler:
    """Dropout; with `num_kept_dims`, whole channels drop, of inputs with more dimensions than `unbatched`."""

    def call(run: Pass, input: Value, p: float = 0.5, training: bool = True, inplace: bool = False) -> Value:  # noqa: A002
        if not training or p == 0 or input.tensor.numel() == 0:
            return input
        x_F = input.lanes()
        if p == 1:
            return run.major(x_F * 0.0)
        shape = list(input.shape)
        if num_kept_dims is not None:
            if len(shape) <= 2 or len(shape) == unbatched:
                raise FusionError(f"dropout of channels on a lane's tensor with {len(shape)} dimensions")
            shape = shape[:num_kept_dims] + [1] * (len(shape) - num_kept_dims)
        return run.major(dropped(x_F, run.noise(shape, x_F, 1 - p), p, alpha=alpha))

    return call


def embedding(
    run: Pass,
    input: Value,  # noqa: A002
    weight: Value,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Value:
    """F.embedding.

    Raises:
        FusionError: With max_norm, scale_grad_by_freq or sparse.
    """
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise FusionError("an embedding with max_norm, scale_grad_by_freq or sparse")
    index = input.tensor.unsqueeze(0) if input.layout == SHARED else input.lanes()
    return run.major(kernels.embedding(index, weight.lanes(), padding_idx))


def layer_norm(
    run: Pass,
    input: Value,  # noqa: A002
    normalized_shape: Any,
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
) -> Value:
    """F.layer_norm."""
    x_F, scale, shift = _normed(input, weight, bias)
    return run.major(kernels.layer_norm(x_F, normalized_shape, scale, shift, eps))


def rms_norm(
    run: Pass,
    input: Value,  # noqa: A002
    normalized_shape: Any,
    weight: Value | None = None,
    eps: float | None = None,
) -> Value:
    """F.rms_norm."""
    x_F, scale, _ = _normed(input, weight, None)
    return run.major(kernels.rms_norm(x_F, normalized_shape, scale, eps))


def _normed(x: Value, weight: Value | None, bias: Value | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x_F = x.tensor.unsqueeze(0) if x.layout == SHARED and weight is not None else x.lanes()
    return x_F, None if weight is None else weight.lanes(), None if bias is None else bias.lanes()


def group_norm(
    run: Pass,
    input: Value,  # noqa: A002
    num_groups: int,
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
) -> Value:
    """F.group_norm."""
    scale, shift = (None if t is None else t.lanes() for t in (weight, bias))
    return run.fold(kernels.group_norm(_folded(input), num_groups, scale, shift, input.num_lanes, eps))


def attention(
    run: Pass,
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """F.scaled_dot_product_attention; by its formula where weights drop out, because torch's kernels draw inside.

    Raises:
        FusionError: Queries, keys and values have different numbers of dimensions, or grouped ones drop out.
    """
    if not query.rank == key.rank == value.rank:
        raise FusionError("attention whose queries, keys and values have different numbers of dimensions")
    q, k, v = query.lanes(), key.lanes(), value.lanes()
    if attn_mask is None:
        mask = None
    elif attn_mask.layout == SHARED:
        shape = attn_mask.tensor.shape
        mask = (
            attn_mask.tensor
            if len(shape) == 2
            else attn_mask.tensor.reshape(1, *[1] * (query.rank - len(shape)), *shape)
        )
    else:
        mask = attn_mask.with_rank(query.rank)
    if dropout_p == 0:
        return run.major(kernels.attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa))
    if enable_gqa:
        raise FusionError("grouped attention with dropout")
    weights = kernels.attention_weights(q, k, mask, is_causal=is_causal, scale=scale)
    noise = run.noise(list(weights.shape[1:]), weights, 1 - dropout_p)
    return run.major(dropped(weights, noise, dropout_p) @ v)
