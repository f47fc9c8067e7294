"""The winning configuration as code that runs on the user's own model with a plain optimizer.

The target keeps its native parametrization, so nothing of the surrogate's factors appears in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "sgd": ("momentum", "weight_decay"),
    "adam": ("eps", "weight_decay"),
    "adamw": ("eps", "weight_decay"),
    "rmsprop": ("alpha", "eps", "momentum", "weight_decay"),
    "adagrad": ("eps", "weight_decay"),
    "lion": ("weight_decay",),
}
_CLASSES = {
    "sgd": "torch.optim.SGD",
    "adam": "torch.optim.Adam",
    "adamw": "torch.optim.AdamW",
    "rmsprop": "torch.optim.RMSprop",
    "adagrad": "torch.optim.Adagrad",
    "lion": "Lion",
}


def winner_code(
    optimizer: str, schedule: str, fixed: Mapping[str, Any], params: Mapping[str, Any], *, steps: int, batch_size: int
) -> str:
    """Python that makes the optimizer and the schedule of a configuration; `model` is the target.

    Args:
        optimizer: The study's optimizer.
        schedule: The study's schedule.
        fixed: Its constants.
        params: What the search found.
        steps: Optimizer steps of a whole training.
        batch_size: The study's batch size, unless `params` names one.
    """
    values = {**fixed, **params}
    arguments = ["model.parameters()", f"lr={values['lr']!r}"]
    if "beta1" in values or "beta2" in values:
        arguments.append(f"betas=({values.get('beta1', 0.9)!r}, {values.get('beta2', _default_beta2(optimizer))!r})")
    arguments += [f"{name}={values[name]!r}" for name in _ARGUMENTS.get(optimizer, ()) if name in values]
    if values.get("nesterov"):
        arguments.append("nesterov=True")
    lines = ["import torch"]
    if optimizer == "lion":
        lines.append("from lion_pytorch import Lion  # torch.optim has none: pip install lion-pytorch")
    if schedule == "cosine":
        lines.insert(0, "import math")
    lines += ["", f"optimizer = {_CLASSES.get(optimizer, optimizer)}({', '.join(arguments)})"]
    factor = _schedule_factor(schedule, values, steps)
    if factor:
        lines.append(f"schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: {factor})")
        lines.append("# after every step: optimizer.step(); schedule.step()")
    lines.append(f"# {steps} steps, batch size {values.get('batch_size', batch_size)}")
    return "\n".join(lines)


def _default_beta2(optimizer: str) -> float:
    return 0.99 if optimizer == "lion" else 0.999


def _schedule_factor(schedule: str, values: Mapping[str, Any], steps: int) -> str:
    """The factor on the learning rate as an expression of `step`; empty where it is 1."""
    warmup = float(values.get("warmup_steps", 0.0))
    factors = [f"min(1.0, (step + 1) / {warmup!r})"] if warmup > 0 else []
    if schedule == "cosine":
        final = float(values.get("final_fraction", 0.0))
        progress = f"min(1.0, max(0.0, step - {warmup!r}) / {max(1.0, steps - warmup)!r})"
        factors.append(f"({final!r} + {1 - final!r} * 0.5 * (1 + math.cos(math.pi * {progress})))")
    elif schedule == "step":
        every = float(values.get("decay_steps", 0.0)) or max(1.0, steps / 3)
        factors.append(f"{values.get('gamma', 0.1)!r} ** (step // {every!r})")
    return " * ".join(factors)
