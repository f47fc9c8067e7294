"""Says what in a model cannot be fused: the operation, and the module that calls it."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hydro_slurm.errors import FusionError


class NotFusableError(FusionError):
    """A model, or its loss, that vmap cannot transform: its lanes train one by one."""

    def __init__(self, message: str, *, operation: str, module: str) -> None:
        super().__init__(message)
        self.operation, self.module = operation, module


def refusal(module: nn.Module, error: Exception, again: Callable[[], object]) -> NotFusableError | None:
    """The refusal that an error under vmap amounts to; None where the model fails without lanes just as well.

    Args:
        module: The model.
        error: What a pass of several lanes raised.
        again: Repeats that pass, to see which call raises.
    """
    if not _is_from_vmap(error):
        return None
    operation = _failing_call(again) or "an operation"
    name = _module_of(module, error.__traceback__)
    where = f"module {name}" if name else "the model's forward" if _in_forward(error) else "the loss"
    return NotFusableError(
        f"{operation} in {where} cannot be fused ({_advice(str(error))}); its lanes train one by one",
        operation=operation,
        module=name,
    )


def _is_from_vmap(error: Exception) -> bool:
    words = ("vmap", "functorch", "Batching rule", "batching rule", "BatchedTensor", "data-dependent")
    return any(word in str(error) for word in words) or _raised_at_unwrapping(error)


def _raised_at_unwrapping(error: Exception) -> bool:
    return "Cannot access data pointer of Tensor that doesn't have storage" in str(error)


def _advice(message: str) -> str:
    if ".item()" in message or "data-dependent" in message:
        return "it decides by the values of a tensor, which differ from lane to lane; use torch.where"
    if "randomness" in message:
        return "it draws random numbers in a way that lanes cannot have for themselves; use torch.nn.functional.dropout"
    return " ".join(message.split())[:200]


class _Recorder(TorchFunctionMode):
    """Notes the call that raises."""

    def __init__(self) -> None:
        super().__init__()
        self.failed = ""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception:
            self.failed = self.failed or torch.overrides.resolve_name(func) or getattr(func, "__name__", str(func))
            raise


def _failing_call(again: Callable[[], object]) -> str:
    recorder = _Recorder()
    try:
        with recorder:
            again()
    except Exception:
        return recorder.failed
    return ""


def _module_of(model: nn.Module, traceback: TracebackType | None) -> str:
    """The name of the innermost module of the model in whose forward the error rose."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and names.get(id(owner)):
            found = f"{names[id(owner)]} ({type(owner).__name__})"
        traceback = traceback.tb_next
    return found


def _in_forward(error: Exception) -> bool:
    traceback = error.__traceback__
    while traceback is not None:
        if isinstance(traceback.tb_frame.f_locals.get("self"), nn.Module):
            return True
        traceback = traceback.tb_next
    return False
