"""Batched kernels against a loop over lanes, in float64: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hydro_slurm.errors import FusionError
from hydro_trials.fusion import kernels
from hydro_trials.fusion.folding import FOLDED, LANE_MAJOR, SHARED, Value, aligned

NUM_LANES, NUM_SAMPLES = 3, 4


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def fold(t_F: Tensor) -> Tensor:
    return t_F.transpose(0, 1).flatten(1, 2)


def unfold(t: Tensor) -> Tensor:
    return t.unflatten(1, (NUM_LANES, -1)).transpose(0, 1)


def assert_same(
    batched: Callable[..., Tensor],
    of_lane: Callable[..., Tensor],
    *tensors: Tensor | None,
    shared: tuple[int, ...] = (),
) -> None:
    """`batched(*tensors)` lane by lane, and the gradients of all tensors; those in `shared` have no lanes."""
    torch.manual_seed(3)
    leaves = [None if t is None else t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
    others = [None if t is None else t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
    y_F = batched(*leaves)
    lanes = [
        of_lane(*(t if t is None or place in shared else t[lane] for place, t in enumerate(others)))
        for lane in range(NUM_LANES)
    ]
    expected_F = torch.stack(lanes)
    torch.testing.assert_close(y_F, expected_F, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected_F)
    for result in (y_F, expected_F):
        (result * weights).sum().backward()
    for own, other in zip(leaves, others, strict=True):
        if own is not None and own.requires_grad:
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-12, atol=1e-12)  # type: ignore[union-attr]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("between", [(), (6,), (2, 5)])
def test_linear(between: tuple[int, ...], has_bias: bool) -> None:
    x, w = draw(NUM_LANES, NUM_SAMPLES, *between, 7), draw(NUM_LANES, 5, 7)
    assert_same(kernels.linear, F.linear, x, w, draw(NUM_LANES, 5) if has_bias else None)


def test_linear_refuses_another_number_of_lanes() -> None:
    with pytest.raises(FusionError, match="inputs carry 2 lanes but weights carry 3"):
        kernels.linear(draw(2, 4, 7), draw(3, 5, 7), None)


CONVOLUTIONS = [F.conv1d, F.conv2d, F.conv3d]
TRANSPOSED = [F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d]


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"groups": 2}, {"groups": 4, "padding": "same"}],
    ids=str,
)
@pytest.mark.parametrize("num_dims", [1, 2, 3])
def test_convolution(num_dims: int, options: dict[str, Any]) -> None:
    def batched(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return unfold(kernels.convolution(fold(x), w, b, **options))

    def of_lane(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return CONVOLUTIONS[num_dims - 1](x, w, b, **options)

    w = draw(NUM_LANES, 8, 4 // options.get("groups", 1), *[3] * num_dims)
    assert_same(batched, of_lane, draw(NUM_LANES, NUM_SAMPLES, 4, *[6] * num_dims), w, draw(NUM_LANES, 8))


def test_convolution_of_a_shared_input() -> None:
    def batched(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return unfold(kernels.convolution(x, w, b, shared=True, padding=1))

    def of_lane(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(x, w, b, padding=1)

    assert_same(
        batched, of_lane, draw(NUM_SAMPLES, 3, 6, 6), draw(NUM_LANES, 5, 3, 3, 3), draw(NUM_LANES, 5), shared=(0,)
    )


def test_convolution_refuses_an_input_without_samples() -> None:
    with pytest.raises(FusionError, match="got 3 dimensions, needed 4"):
        kernels.convolution(draw(9, 6, 6), draw(3, 5, 3, 3, 3), None)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1, "output_padding": 1}, {"groups": 2}], ids=str)
@pytest.mark.parametrize("num_dims", [1, 2, 3])
def test_transposed_convolution(num_dims: int, options: dict[str, Any]) -> None:
    def batched(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return unfold(kernels.transposed_convolution(fold(x), w, b, **options))

    def of_lane(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return TRANSPOSED[num_dims - 1](x, w, b, **options)

    w = draw(NUM_LANES, 4, 6 // options.get("groups", 1), *[3] * num_dims)
    assert_same(batched, of_lane, draw(NUM_LANES, NUM_SAMPLES, 4, *[4] * num_dims), w, draw(NUM_LANES, 6))


@pytest.mark.parametrize("momentum", [0.1, None], ids=["exponential", "cumulative"])
@pytest.mark.parametrize("uses_batch", [True, False])
@pytest.mark.parametrize("strided", [False, True])
def test_batch_norm_keeps_statistics_per_lane(uses_batch: bool, momentum: float | None, strided: bool) -> None:
    mean, var = draw(NUM_LANES, 6), torch.rand(NUM_LANES, 6, dtype=torch.float64) + 0.5
    if strided:
        mean, var = mean.T.contiguous().T, var.T.contiguous().T
    own, other = (mean.clone(), var.clone()), (mean.clone(), var.clone())
    shares = torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64)  # lanes have seen different numbers of batches

    def batched(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        share = shares if momentum is None else momentum
        return unfold(kernels.batch_norm(fold(x), *own, w, b, uses_batch=uses_batch, momentum=share, eps=1e-5))

    lanes = iter(range(NUM_LANES))

    def of_lane(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        lane = next(lanes)
        share = float(shares[lane]) if momentum is None else momentum
        return F.batch_norm(x, other[0][lane], other[1][lane], w, b, uses_batch, share, 1e-5)

    assert_same(batched, of_lane, draw(NUM_LANES, NUM_SAMPLES, 6, 3, 3), draw(NUM_LANES, 6), draw(NUM_LANES, 6))
    for mine, theirs in zip(own, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert torch.equal(own[0], mean) != uses_batch


def test_batch_norm_without_statistics_uses_the_batch() -> None:
    def batched(x: Tensor) -> Tensor:
        return unfold(kernels.batch_norm(fold(x), None, None, None, None, uses_batch=True, momentum=0.1, eps=1e-5))

    assert_same(batched, lambda x: F.batch_norm(x, None, None, training=True), draw(NUM_LANES, NUM_SAMPLES, 6, 5))


def test_group_norm() -> None:
    def batched(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return unfold(kernels.group_norm(fold(x), 2, w, b, NUM_LANES, 1e-5))

    def of_lane(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.group_norm(x, 2, w, b)

    assert_same(batched, of_lane, draw(NUM_LANES, NUM_SAMPLES, 6, 3, 3), draw(NUM_LANES, 6), draw(NUM_LANES, 6))


@pytest.mark.parametrize("shape", [(6,), (5, 6)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_layer_norm(shape: tuple[int, ...], has_bias: bool) -> None:
    def batched(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return kernels.layer_norm(x, shape, w, b, 1e-5)

    def of_lane(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.layer_norm(x, shape, w, b)

    bias = draw(NUM_LANES, *shape) if has_bias else None
    assert_same(batched, of_lane, draw(NUM_LANES, NUM_SAMPLES, 5, 6), draw(NUM_LANES, *shape), bias)


def test_rms_norm() -> None:
    assert_same(
        lambda x, w: kernels.rms_norm(x, (6,), w, 1e-6),
        lambda x, w: F.rms_norm(x, (6,), w, 1e-6),
        draw(NUM_LANES, NUM_SAMPLES, 6),
        draw(NUM_LANES, 6),
    )


@pytest.mark.parametrize("padding_idx", [None, 0, 2, -1])
def test_the_padding_row_of_every_lane_gets_no_gradient(padding_idx: int | None) -> None:
    index = torch.randint(0, 5, (NUM_LANES, NUM_SAMPLES, 9))
    index[:, 0, :5] = torch.arange(5)  # every row is looked up
    table = draw(NUM_LANES, 5, 3)
    assert_same(
        lambda i, t: kernels.embedding(i, t, padding_idx),
        lambda i, t: F.embedding(i, t, padding_idx),
        index,
        table,
    )
    leaf = table.requires_grad_()
    kernels.embedding(index[:1], leaf, padding_idx).sum().backward()
    assert leaf.grad is not None
    is_zero = (leaf.grad == 0).all(dim=2)
    expected = torch.zeros(NUM_LANES, 5, dtype=torch.bool)
    if padding_idx is not None:
        expected[:, padding_idx] = True
    assert torch.equal(is_zero, expected)


@pytest.mark.parametrize("index", [5, -1])
def test_an_index_never_reaches_a_neighbours_table(index: int) -> None:
    with pytest.raises(FusionError, match="needed 0 to 4"):
        kernels.embedding(torch.full((NUM_LANES, 2), index), draw(NUM_LANES, 5, 3))


@pytest.mark.parametrize("mask", [None, "causal", "bool", "per sample"])
@pytest.mark.parametrize("heads", [(), (2,)])
def test_attention(mask: str | None, heads: tuple[int, ...]) -> None:
    q, k, v = (draw(NUM_LANES, NUM_SAMPLES, *heads, 5, 4) for _ in range(3))
    allowed = torch.ones(NUM_LANES, NUM_SAMPLES, *[1 for _ in heads], 5, 5, dtype=torch.bool).tril()
    if mask == "bool":
        allowed = allowed[:, :1]
    masks = None if mask in (None, "causal") else allowed

    def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.attention(q, k, v, masks, is_causal=mask == "causal")

    def of_lane(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lane = None if masks is None else masks[0]
        return F.scaled_dot_product_attention(q, k, v, lane, is_causal=mask == "causal")

    def by_formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.attention_weights(q, k, masks, is_causal=mask == "causal", scale=None) @ v

    assert_same(batched, of_lane, q, k, v)
    assert_same(by_formula, of_lane, q, k, v)


@pytest.mark.parametrize("positions", [(), (2, 3)])
@pytest.mark.parametrize("shared", [True, False])
def test_cross_entropy(shared: bool, positions: tuple[int, ...]) -> None:
    y = torch.randint(0, 5, (1 if shared else NUM_LANES, NUM_SAMPLES, *positions))
    y[0, 1] = -100  # left out of the mean
    every = y.expand(NUM_LANES, *y.shape[1:])
    logits = draw(NUM_LANES, NUM_SAMPLES, 5, *positions)
    assert_same(lambda x, _: kernels.cross_entropy(x, y), F.cross_entropy, logits, every)


@pytest.mark.parametrize("layouts", [(a, b) for a in range(3) for b in range(3)], ids=str)
@pytest.mark.parametrize("shape", [(NUM_SAMPLES, 6, 5), (1, 6, 1), (NUM_SAMPLES, 1, 5), (6, 1), (5,), ()], ids=str)
def test_values_of_any_layouts_broadcast_as_lanes_do(layouts: tuple[int, int], shape: tuple[int, ...]) -> None:
    def make(layout: int, shape: tuple[int, ...]) -> tuple[Value, Tensor]:
        t_F = draw(*shape).expand(NUM_LANES, *shape) if layout == SHARED else draw(NUM_LANES, *shape)
        if layout == FOLDED and len(shape) >= 2:
            return Value(fold(t_F), FOLDED, NUM_LANES), t_F
        return Value(t_F[0] if layout == SHARED else t_F, min(layout, LANE_MAJOR), NUM_LANES), t_F

    left, left_F = make(layouts[0], (NUM_SAMPLES, 6, 5))
    right, right_F = make(layouts[1], shape)
    (a, b), layout = aligned([left, right])
    result = Value(a - b, layout, NUM_LANES)
    expected_F = torch.stack([x - y for x, y in zip(left_F, right_F, strict=True)])
    assert result.shape == expected_F.shape[1:]
    assert torch.equal(result.lanes(), expected_F)


def test_a_lanes_number_does_not_promote_the_type() -> None:
    half = Value(torch.ones(NUM_LANES, 4, dtype=torch.bfloat16), LANE_MAJOR, NUM_LANES)
    number = Value(torch.ones(NUM_LANES), LANE_MAJOR, NUM_LANES)
    (a, b), _ = aligned([half, number])
    assert (a * b).dtype == torch.bfloat16
