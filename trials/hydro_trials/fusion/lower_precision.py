"""Autocast for lanes: which of a model's calls compute in bf16, and which in full precision.

Under vmap torch's own autocast sees some calls only after they have been taken apart, and misses them (a linear layer
with a bias, a convolution). So lanes' calls are cast where the mode of `intercept` sees them, by torch's own lists.

Source: torch's documentation of automatic mixed precision, the lists for CPU and for CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

_LOWER: frozenset[Callable[..., Any]] = frozenset(
    {
        *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        *(F.scaled_dot_product_attention, torch.lstm_cell, torch.einsum),
        *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.addbmm, torch.mv, torch.addmv),
        *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm, Tensor.addbmm, Tensor.mv),
        *(Tensor.__matmul__, Tensor.__rmatmul__),
    }
)
_FULL: frozenset[Callable[..., Any]] = frozenset(
    {
        *(F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div),
        *(F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.cosine_embedding_loss, F.poisson_nll_loss),
        *(F.hinge_embedding_loss, F.margin_ranking_loss, F.multi_margin_loss, F.multilabel_margin_loss),
        *(F.soft_margin_loss, F.triplet_margin_loss, F.ctc_loss, torch.cdist, torch.prod, Tensor.prod),
    }
)
_NORMS: frozenset[Callable[..., Any]] = frozenset({F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm})
"""Take a lower type and give it back, but compute in full: their parameters have the full type."""
_FULL_ON_CUDA: frozenset[Callable[..., Any]] = frozenset(
    {
        *(F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, Tensor.log_softmax),
        *(F.layer_norm, F.group_norm, F.normalize, torch.exp, Tensor.exp, torch.log, Tensor.log, torch.pow),
        *(Tensor.pow, torch.sum, Tensor.sum, torch.cumsum, Tensor.cumsum, torch.norm, F.softplus),
    }
)


class LanePrecision:
    """Casts the arguments of calls.

    Args:
        dtype: What matrix products and the like compute in; they return it.
        device: Decides which list holds.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._full = _FULL | _FULL_ON_CUDA if device.type == "cuda" else _FULL

    def is_cast(self, func: Callable[..., Any]) -> bool:
        """Whether this function's arguments are cast."""
        return func in _LOWER or func in self._full or func in _NORMS

    def cast(self, func: Callable[..., Any], arguments: Any) -> Any:
        """The arguments of a call as it has to see them."""
        if func in _LOWER:
            return tree_map(lambda item: _to(item, self._dtype), arguments)
        if func in self._full or func in _NORMS:
            return tree_map(lambda item: _to(item, torch.float32, only=self._dtype), arguments)
        return arguments

    def result(self, func: Callable[..., Any], args: tuple[Any, ...], result: Any) -> Any:
        """What a call gives back, of `args` as they were before they were cast."""
        if func in _NORMS and func not in self._full and args and args[0].dtype == self._dtype:
            return result.to(self._dtype)
        return result


def _to(item: Any, dtype: torch.dtype, only: torch.dtype | None = None) -> Any:
    if not isinstance(item, Tensor) or not item.is_floating_point() or item.dtype == torch.float64:
        return item
    return item.to(dtype) if only in (None, item.dtype) else item
