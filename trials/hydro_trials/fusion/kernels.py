"""Layers of F lanes as single batched kernels. No kernel mixes lanes, forward or backward.

Shape suffixes: F = lanes, B = samples per lane, I/O = in/out features, C/G = channels of one lane, lanes folded into
channels; N = positions of one sample, V = rows of a table, D = size of a row, H = heads, T/S = queries/keys,
L = any spatial dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hydro_slurm.errors import FusionError

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def linear(x_FBI: Tensor, w_FOI: Tensor, b_FO: Tensor | None) -> Tensor:
    """F linear layers as one batched GEMM with the bias in it; lane f is `x_FBI[f] @ w_FOI[f].T + b_FO[f]`.

    Args:
        x_FBI: Shape (F, ..., I).
        w_FOI: As nn.Linear has it, stacked.
        b_FO: Likewise, or None.

    Returns:
        Shape (F, ..., O).

    Raises:
        FusionError: Inputs and weights carry different numbers of lanes.

    Source: HFTA (MLSys 2021), section 3.
    """
    if x_FBI.shape[0] != w_FOI.shape[0]:
        raise FusionError(f"inputs carry {x_FBI.shape[0]} lanes but weights carry {w_FOI.shape[0]}; rebuild the bundle")
    if x_FBI.dim() == 3:
        # Features before samples: weights and their gradient lie as the product has them, which takes a quarter off.
        x_FIB = x_FBI.transpose(1, 2)
        y_FOB = torch.bmm(w_FOI, x_FIB) if b_FO is None else torch.baddbmm(b_FO.unsqueeze(2), w_FOI, x_FIB)
        return y_FOB.transpose(1, 2)
    shape = x_FBI.shape
    x_FNI, w_FIO = x_FBI.reshape(shape[0], shape[1:-1].numel(), shape[-1]), w_FOI.transpose(1, 2)
    y_FNO = torch.bmm(x_FNI, w_FIO) if b_FO is None else torch.baddbmm(b_FO.unsqueeze(1), x_FNI, w_FIO)
    return y_FNO.view(*shape[:-1], w_FOI.shape[1])


def convolution(
    x_BC: Tensor,
    w_FOC: Tensor,
    b_FO: Tensor | None,
    *,
    shared: bool = False,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """F convolutions in one to three dimensions as one, with a group per lane and group.

    Args:
        x_BC: Shape (B, F*C, L); where all lanes share it, (B, C, L), and then only without groups.
        w_FOC: As nn.ConvNd has it, stacked: (F, O, C / groups, *kernel).
        b_FO: Likewise, or None.
        shared: Whether the lanes share the input.
        stride: As nn.ConvNd has it, like the rest.

    Returns:
        Shape (B, F*O, L').

    Raises:
        FusionError: The input has no dimension of samples.

    Source: HFTA (MLSys 2021), section 3.
    """
    _check_rank(x_BC, w_FOC.dim() - 1)
    groups = 1 if shared else w_FOC.shape[0] * groups
    bias = None if b_FO is None else b_FO.flatten()
    return _CONVOLUTIONS[w_FOC.dim() - 3](x_BC, w_FOC.flatten(0, 1), bias, stride, padding, dilation, groups)


def transposed_convolution(
    x_BC: Tensor,
    w_FCO: Tensor,
    b_FO: Tensor | None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """F transposed convolutions in one to three dimensions as one, with a group per lane and group.

    Args:
        x_BC: Shape (B, F*C, L).
        w_FCO: As nn.ConvTransposeNd has it, stacked: (F, C, O / groups, *kernel).
        b_FO: Likewise, or None.
        stride: As nn.ConvTransposeNd has it, like the rest.

    Returns:
        Shape (B, F*O, L').

    Raises:
        FusionError: The input has no dimension of samples.
    """
    _check_rank(x_BC, w_FCO.dim() - 1)
    bias = None if b_FO is None else b_FO.flatten()
    function = _TRANSPOSED[w_FCO.dim() - 3]
    groups *= w_FCO.shape[0]
    return function(x_BC, w_FCO.flatten(0, 1), bias, stride, padding, output_padding, groups, dilation)


def _check_rank(x_BC: Tensor, rank: int) -> None:
    if x_BC.dim() != rank:
        raise FusionError(f"a convolution got {x_BC.dim()} dimensions, needed {rank}: samples, channels and positions")


def batch_norm(
    x_BC: Tensor,
    running_mean_FC: Tensor | None,
    running_var_FC: Tensor | None,
    w_FC: Tensor | None,
    b_FC: Tensor | None,
    *,
    uses_batch: bool,
    momentum: float | Tensor,
    eps: float,
) -> Tensor:
    """F batch norms as one over F*C channels.

    Args:
        x_BC: Shape (B, F*C, L).
        running_mean_FC: Updated in place where `uses_batch`.
        running_var_FC: Likewise.
        w_FC: Scale, or None.
        b_FC: Shift, or None.
        uses_batch: Whether to normalise by the batch's own moments.
        momentum: Share of the new moments in the running ones; a tensor (F,) gives each lane its own.
        eps: Added to the variance.

    Returns:
        Shape (B, F*C, L).
    """
    weight, bias = _flat(w_FC), _flat(b_FC)
    if running_mean_FC is None or running_var_FC is None:
        return F.batch_norm(x_BC, None, None, weight, bias, True, 0.0, eps)
    if not uses_batch:
        return F.batch_norm(x_BC, _flat(running_mean_FC), _flat(running_var_FC), weight, bias, False, 0.0, eps)
    if isinstance(momentum, float) and running_mean_FC.is_contiguous() and running_var_FC.is_contiguous():
        # views: the kernel updates the lanes' own statistics
        return F.batch_norm(x_BC, running_mean_FC.view(-1), running_var_FC.view(-1), weight, bias, True, momentum, eps)
    mean_FC, var_FC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (running_mean_FC,) * 2)
    mean_FC.zero_()
    var_FC.zero_()
    y_BC = F.batch_norm(x_BC, mean_FC.view(-1), var_FC.view(-1), weight, bias, True, 1.0, eps)
    share = momentum.unsqueeze(1).to(mean_FC.dtype) if isinstance(momentum, Tensor) else momentum
    running_mean_FC.copy_(share * mean_FC + (1 - share) * running_mean_FC)
    running_var_FC.copy_(share * var_FC + (1 - share) * running_var_FC)
    return y_BC


def group_norm(
    x_BC: Tensor, num_groups: int, w_FC: Tensor | None, b_FC: Tensor | None, num_lanes: int, eps: float
) -> Tensor:
    """F group norms as one with F times as many groups; `x_BC` and what is returned have shape (B, F*C, L)."""
    return F.group_norm(x_BC, num_groups * num_lanes, _flat(w_FC), _flat(b_FC), eps)


def layer_norm(x_F: Tensor, shape: Sequence[int], w_F: Tensor | None, b_F: Tensor | None, eps: float) -> Tensor:
    """F layer norms: one without parameters, then each lane's scale and shift.

    Args:
        x_F: Shape (F, ..., *shape), or (1, ..., *shape) where all lanes share it.
        shape: What is normalised over.
        w_F: Scale (F, *shape), or None.
        b_F: Shift likewise, or None.
        eps: Added to the variance.

    Returns:
        Shape (F, ..., *shape); where there is neither scale nor shift, that of `x_F`.
    """
    return _scaled(F.layer_norm(x_F, tuple(shape), None, None, eps), w_F, b_F)


def rms_norm(x_F: Tensor, shape: Sequence[int], w_F: Tensor | None, eps: float | None) -> Tensor:
    """F RMS norms; arguments and result as in `layer_norm`."""
    return _scaled(F.rms_norm(x_F, tuple(shape), None, eps), w_F, None)


def _scaled(y_F: Tensor, w_F: Tensor | None, b_F: Tensor | None) -> Tensor:
    def spread(t_F: Tensor) -> Tensor:
        return t_F.reshape(t_F.shape[0], *[1] * (y_F.dim() - t_F.dim()), *t_F.shape[1:])

    if w_F is None:
        return y_F
    if b_F is None:
        return (y_F * spread(w_F)).to(y_F.dtype)
    if y_F.dtype == w_F.dtype:
        return torch.addcmul(spread(b_F), y_F, spread(w_F))
    return (y_F * spread(w_F) + spread(b_F)).to(y_F.dtype)


def embedding(index_FB: Tensor, table_FVD: Tensor, padding_idx: int | None = None) -> Tensor:
    """F tables as one, each lane's indices moved to its own rows.

    Args:
        index_FB: Whole numbers (F, ...), or (1, ...) where all lanes share them.
        table_FVD: The tables.
        padding_idx: A row that gets no gradient, in every lane; negative ones count from the end.

    Returns:
        Shape (F, ..., D).

    Raises:
        FusionError: An index is no row of a lane's table (on a GPU an assertion on the device fails): it would be one
            of the neighbour's.
    """
    num_lanes, num_rows, _ = table_FVD.shape
    _check_range(index_FB, num_rows)
    first_F = torch.arange(0, num_lanes * num_rows, num_rows, device=index_FB.device)
    rows_FBD = F.embedding(index_FB + first_F.view(-1, *[1] * (index_FB.dim() - 1)), table_FVD.flatten(0, 1))
    if padding_idx is None:
        return rows_FBD
    return torch.where((index_FB == padding_idx % num_rows).unsqueeze(-1), rows_FBD.detach(), rows_FBD)


def _check_range(index: Tensor, num_rows: int) -> None:
    is_inside = ((index >= 0) & (index < num_rows)).all()
    if index.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(is_inside)  # waits for nothing
    elif not is_inside:
        raise FusionError(
            f"an embedding of {num_rows} rows got indices {int(index.min())} to {int(index.max())}; "
            f"needed 0 to {num_rows - 1}"
        )


def attention(q_FBHTD: Tensor, k_FBHSD: Tensor, v_FBHSD: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Scaled dot product attention of F lanes, folded into the samples.

    Args:
        q_FBHTD: Queries (F, B, ..., T, D); keys and values likewise.
        mask: Shape (F, ..., T, S) with as many dimensions as the queries; or None.
        options: As torch has them: is_causal, scale, enable_gqa.

    Returns:
        Shape (F, B, ..., T, D of the values).
    """

    def fold(t_F: Tensor) -> Tensor:
        return t_F.flatten(0, 1) if t_F.dim() > 3 else t_F

    num_lanes = q_FBHTD.shape[0]
    if mask is not None and mask.dim() > 3:
        mask = mask.expand(num_lanes, q_FBHTD.shape[1], *mask.shape[2:]).flatten(0, 1)
    y = F.scaled_dot_product_attention(fold(q_FBHTD), fold(k_FBHSD), fold(v_FBHSD), mask, **options)
    return y.view(*q_FBHTD.shape[:-1], y.shape[-1])


def attention_weights(
    q_FBHTD: Tensor, k_FBHSD: Tensor, mask: Tensor | None, *, is_causal: bool, scale: float | None
) -> Tensor:
    """What attention weighs the values with, by its formula: shape (F, B, H, T, S)."""
    scores = q_FBHTD @ k_FBHSD.transpose(-2, -1) * (q_FBHTD.size(-1) ** -0.5 if scale is None else scale)
    if is_causal:
        allowed = torch.ones(q_FBHTD.size(-2), k_FBHSD.size(-2), dtype=torch.bool, device=q_FBHTD.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, dim=-1)


def cross_entropy(logits_FBK: Tensor, y_FB: Tensor) -> Tensor:
    """F.cross_entropy of each lane: the mean over targets that are not -100.

    Args:
        logits_FBK: Shape (F, B, K, ...).
        y_FB: Classes (F, B, ...), or (1, B, ...) where all lanes share them.

    Returns:
        Shape (F,).
    """
    num_lanes = logits_FBK.shape[0]
    every_FB = y_FB.expand(num_lanes, *y_FB.shape[1:])
    losses = F.cross_entropy(logits_FBK.flatten(0, 1), every_FB.flatten(0, 1), reduction="none")
    return losses.view(num_lanes, -1).sum(1) / (y_FB != -100).flatten(1).sum(1)


def _flat(t_FC: Tensor | None) -> Tensor | None:
    return None if t_FC is None else t_FC.reshape(-1)
