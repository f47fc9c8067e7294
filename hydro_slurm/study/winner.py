"""The winning configuration as code that runs on the user's own model with a plain optimizer.

The target keeps its native parametrization, so nothing of the surrogate's factors appears in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CLASSES = {
    "sgd": "torch.optim.SGD",
    "adam": "torch.optim.Adam",
    "adamw": "torch.optim.AdamW",
    "rmsprop": "torch.optim.RMSprop",
    "adagrad": "torch.optim.Adagrad",
    "lion": "Lion",
}
_NUMBERS = (
    "alpha",
    "eps",
    "momentum",
    "dampening",
    "weight_decay",
    "lr_decay",
    "initial_accumulator_value",
)
_FLAGS = ("nesterov", "amsgrad", "centered")


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
        beta2 = values.get("beta2", 0.99 if optimizer == "lion" else 0.999)
        arguments.append(f"betas=({values.get('beta1', 0.9)!r}, {beta2!r})")
    arguments += [f"{name}={values[name]!r}" for name in _NUMBERS if name in values]
    arguments += [f"{name}=True" for name in _FLAGS if values.get(name)]
    factor = _schedule_factor(schedule, values, steps)
    lines = ["import math", ""] if "math." in factor else []
    lines.append("import torch")
    if optimizer == "lion":
        lines.append("from lion_pytorch import Lion  # torch.optim has none: pip install lion-pytorch")
    lines += ["", f"optimizer = {_CLASSES[optimizer]}({', '.join(arguments)})"]
    if factor:
        lines.append(f"schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: {factor})")
    lines.append(f"# {steps} steps, batch size {values.get('batch_size', batch_size)}; in each:")
    for name, function in (("clip_norm", "clip_grad_norm_"), ("clip_value", "clip_grad_value_")):
        if values.get(name):
            lines.append(f"# torch.nn.utils.{function}(model.parameters(), {values[name]!r})")
    lines.append("# optimizer.step(); schedule.step()" if factor else "# optimizer.step()")
    return "\n".join(lines)


def _schedule_factor(schedule: str, values: Mapping[str, Any], steps: int) -> str:
    """The factor on the learning rate as an expression of `step`; empty where it is 1."""
    warmup = float(values.get("warmup_steps", 0.0))
    factors = [f"min(1.0, (step + 1) / {warmup!r})"] if warmup > 0 else []
    progress = f"min(1.0, max(0.0, step - {warmup!r}) / {max(1.0, steps - warmup)!r})"
    gamma = float(values.get("gamma", 0.1))
    if schedule == "cosine":
        factors.append(_anneal(1.0, float(values.get("final_fraction", 0.0)), progress))
    elif schedule == "step":
        factors.append(f"{gamma!r} ** (step // {float(values.get('decay_steps', 0.0)) or max(1.0, steps / 3)!r})")
    elif schedule == "multistep":
        reached = [float(values[name]) for name in (f"milestone_{n}" for n in range(1, 5)) if values.get(name)]
        factors.append(f"{gamma!r} ** sum(step >= milestone for milestone in {reached!r})")
    elif schedule == "exponential":
        factors.append(f"{gamma!r} ** (step / {float(values.get('decay_steps', 1.0))!r})")
    elif schedule == "polynomial":
        factors.append(f"(1 - {progress}) ** {float(values.get('power', 1.0))!r}")
    elif schedule == "onecycle":
        first = 1 / float(values.get("div_factor", 25.0))
        last = first / float(values.get("final_div_factor", 1e4))
        peak, end = float(values.get("pct_start", 0.3)) * steps - 1, steps - 1
        rise = _anneal(first, 1.0, f"step / {max(peak, 1e-9)!r}")
        fall = _anneal(1.0, last, f"min(1.0, (step - {peak!r}) / {max(end - peak, 1e-9)!r})")
        factors.append(f"({rise} if 0 < {peak!r} >= step else {fall})")
    return " * ".join(factors)


def _anneal(start: float, end: float, progress: str) -> str:
    """Half a cosine."""
    return f"({end!r} + {start - end!r} * 0.5 * (1 + math.cos(math.pi * {progress})))"
