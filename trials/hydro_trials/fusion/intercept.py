"""Functions of torch that mean something else for a lane than for a batch.

A TorchFunctionMode sees a model's calls before vmap does. It gives lanes their own random draws (see `randomness`),
keeps the padding row of an embedding out of the gradient (vmap moves lanes' tables into one, where its number no longer
tells it), and takes attention apart where torch has no batched kernel. Models that call nothing of this run without it.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hydro_trials.fusion.lower_precision import LanePrecision
from hydro_trials.fusion.randomness import LaneGenerators, dropped

_UNBATCHED_DIMS: dict[Callable[..., Any], int] = {F.dropout1d: 2, F.dropout3d: 4}
"""Dimensions of an input without samples, where the function takes such (dropout2d does not, for history's sake)."""


class LaneFunctions(TorchFunctionMode):
    """The mode.

    Args:
        lane: This lane's row, a whole number as a tensor without dimensions; under vmap, all of them.
        generators: Seeded for this pass.
        precision: What casts arguments, where the pass computes in lower precision.
    """

    def __init__(self, lane: Tensor, generators: LaneGenerators, precision: LanePrecision | None = None) -> None:
        super().__init__()
        self._lane, self._generators, self.precision = lane, generators, precision
        self.num_handled = self.num_drawn = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call of the model means for a lane."""
        handler = _HANDLERS.get(func)
        self.num_handled += handler is not None or self.precision is not None
        given = args
        if self.precision is not None:
            args, kwargs = self.precision.cast(func, (args, kwargs))
        result = func(*args, **kwargs) if handler is None else handler(self, func, *args, **kwargs)
        return result if self.precision is None else self.precision.result(func, given, result)

    def draw(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """See `LaneGenerators.draw`."""
        self.num_drawn += 1
        return self._generators.draw(self._lane, function, *args, **kwargs)

    def noise(self, shape: list[int], like: Tensor, keep: float) -> Tensor:
        """See `LaneGenerators.noise`."""
        self.num_drawn += 1
        if shape != list(like.shape):
            return self._generators.noise(self._lane, shape, like, keep)
        # torch fills a mask in the order in which the masked tensor lies in memory
        order = sorted(range(like.dim()), key=lambda dim: like.stride()[dim], reverse=True)
        noise = self._generators.noise(self._lane, [shape[dim] for dim in order], like, keep)
        return noise.permute([order.index(dim) for dim in range(like.dim())])


def _dropout(num_kept_dims: int | None, alpha: bool = False) -> Callable[..., Any]:
    """A handler; with `num_kept_dims`, whole channels drop: the noise has size 1 beyond that many dimensions."""

    def handle(
        mode: LaneFunctions,
        func: Callable[..., Any],
        input: Tensor,  # noqa: A002
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        if not training or p == 0 or input.numel() == 0:
            return input
        if p == 1:
            return input.mul_(0.0) if inplace else input * 0.0
        shape = list(input.shape)
        if num_kept_dims is not None:
            kept = num_kept_dims - 1 if len(shape) == _UNBATCHED_DIMS.get(func, -1) else num_kept_dims
            shape = shape[:kept] + [1] * (len(shape) - kept)
        return dropped(input, mode.noise(shape, input, 1 - p), p, alpha=alpha, inplace=inplace)

    return handle


def _attention(
    mode: LaneFunctions,
    func: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention by its formula where its weights drop out, because torch's kernels draw inside."""
    if dropout_p == 0:
        options = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        if query.device.type != "cpu":
            return func(query, key, value, **options)
        with sdpa_kernel(SDPBackend.MATH):  # the others have no batching rule on a CPU: vmap would loop over lanes
            return func(query, key, value, **options)
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scores = query @ key.transpose(-2, -1) * (query.size(-1) ** -0.5 if scale is None else scale)
    if is_causal:
        allowed = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if attn_mask is not None:
        bias = attn_mask
        scores = scores.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else scores + bias
    weights = torch.softmax(scores, dim=-1)
    return dropped(weights, mode.noise(list(weights.shape), weights, 1 - dropout_p), dropout_p) @ value


def _embedding(
    mode: LaneFunctions,
    func: Callable[..., Any],
    input: Tensor,  # noqa: A002
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Look up; the row `padding_idx` gets no gradient."""
    if max_norm is not None or scale_grad_by_freq:
        return func(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    rows: Tensor = func(input, weight)
    if padding_idx is None:
        return rows
    is_padding = (input == padding_idx % weight.size(0)).unsqueeze(-1)
    return torch.where(is_padding, rows.detach(), rows)


def _gumbel_softmax(
    mode: LaneFunctions,
    func: Callable[..., Any],
    logits: Tensor,
    tau: float = 1,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
) -> Tensor:
    noise = -mode.draw(_exponential, tuple(logits.shape), logits.dtype, logits.device).log()
    soft = ((logits + noise) / tau).softmax(dim)
    if not hard:
        return soft
    chosen = torch.zeros_like(logits).scatter(dim, soft.max(dim, keepdim=True)[1], 1.0)
    return chosen - soft.detach() + soft


def _exponential(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device).exponential_(generator=generator)


def _lstm_cell(
    mode: LaneFunctions,
    func: Callable[..., Any],
    x: Tensor,
    state: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """By its formula: torch's own has no batching rule."""
    gates = F.linear(x, w_ih, b_ih) + F.linear(state[0], w_hh, b_hh)
    inside, forget, cell, out = gates.chunk(4, dim=-1)
    new_cell = forget.sigmoid() * state[1] + inside.sigmoid() * cell.tanh()
    return out.sigmoid() * new_cell.tanh(), new_cell


def _composite(mode: LaneFunctions, func: Any, *args: Any, **kwargs: Any) -> Any:
    """A Python function of torch that draws by calling others: run its body with those others replaced."""
    replaced = {
        name: _bind(mode, value)
        for name, value in func.__globals__.items()
        if callable(value) and _is_handled(mode, value) and value is not func
    }
    names = {**func.__globals__, **replaced, "has_torch_function": _never, "has_torch_function_unary": _never}
    body = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body(*args, **kwargs)


def _is_handled(mode: LaneFunctions, value: Any) -> bool:
    try:
        return value in _HANDLERS or (mode.precision is not None and mode.precision.is_cast(value))
    except TypeError:  # not hashable
        return False


def _bind(mode: LaneFunctions, func: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return mode.call(func, args, kwargs)

    return call


def _never(*_: Any) -> bool:
    return False


def _drawn(mode: LaneFunctions, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A function that takes a generator: call it with the lane's, unless the caller gave one."""
    if kwargs.get("generator") is not None:
        return func(*args, **kwargs)
    kwargs.pop("generator", None)
    return mode.draw(func, *args, **kwargs)


def _drawn_like(by: Callable[..., Tensor]) -> Callable[..., Any]:
    def handle(
        mode: LaneFunctions,
        func: Callable[..., Any],
        input: Tensor,  # noqa: A002
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        **options: Any,
    ) -> Tensor:
        return mode.draw(by, tuple(input.shape), dtype=dtype or input.dtype, device=device or input.device)

    return handle


def _drawn_inplace(mode: LaneFunctions, func: Callable[..., Any], self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    def fill(*args: Any, **kwargs: Any) -> Any:
        return func(torch.empty(shape, dtype=dtype, device=device), *args, **kwargs)

    shape, dtype, device = tuple(self.shape), self.dtype, self.device
    kwargs.pop("generator", None)
    return self.copy_(mode.draw(fill, *args, **kwargs))


_HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.dropout: _dropout(None),
    torch.dropout: _dropout(None),
    F.dropout1d: _dropout(2),
    F.dropout2d: _dropout(2),
    F.dropout3d: _dropout(2),
    F.alpha_dropout: _dropout(None, alpha=True),
    F.feature_alpha_dropout: _dropout(2, alpha=True),
    F.embedding: _embedding,
    F.gumbel_softmax: _gumbel_softmax,
    torch.lstm_cell: _lstm_cell,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _composite,
    **dict.fromkeys((torch.rand, torch.randn, torch.randint, torch.randperm, torch.bernoulli, torch.normal), _drawn),
    **dict.fromkeys((torch.multinomial, torch.poisson, Tensor.bernoulli, Tensor.multinomial), _drawn),
    torch.rand_like: _drawn_like(torch.rand),
    torch.randn_like: _drawn_like(torch.randn),
    **dict.fromkeys((Tensor.bernoulli_, Tensor.normal_, Tensor.uniform_, Tensor.exponential_), _drawn_inplace),
}


@contextmanager
def lane_functions(
    lane: Tensor, generators: LaneGenerators | None, precision: LanePrecision | None = None
) -> Iterator[LaneFunctions | None]:
    """The mode, or nothing where there are no generators."""
    if generators is None:
        yield None
        return
    mode = LaneFunctions(lane, generators, precision)
    with mode:
        yield mode
