"""The separate computation: one trial, the plain module, torch.optim, an ordinary loop. Lanes must equal it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import hydro_trials as hydro
from hydro_trials.fusion.streams import SampleStream, derive_seed
from hydro_trials.hyperparameters import resolve_hyperparameters
from hydro_trials.schedules import lr_multiplier
from hydro_trials.surrogate import Surrogate


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2, as it is printed; torch has none."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                update = (beta1 * mean + (1 - beta1) * parameter.grad).sign() + group["weight_decay"] * parameter
                parameter -= group["lr"] * update
                mean.copy_(beta2 * mean + (1 - beta2) * parameter.grad)


def make_optimizer(kind: str, params: Iterable[Any], values: dict[str, float]) -> torch.optim.Optimizer:
    """torch's own optimizer with one trial's hyperparameters."""
    v = values
    common: dict[str, Any] = {"lr": v["lr"], "weight_decay": v["weight_decay"]}
    if kind == "sgd":
        return torch.optim.SGD(
            params, momentum=v["momentum"], dampening=v["dampening"], nesterov=bool(v["nesterov"]), **common
        )
    if kind in ("adam", "adamw"):
        make = torch.optim.Adam if kind == "adam" else torch.optim.AdamW
        return make(params, betas=(v["beta1"], v["beta2"]), eps=v["eps"], amsgrad=bool(v["amsgrad"]), **common)
    if kind == "rmsprop":
        return torch.optim.RMSprop(
            params, alpha=v["alpha"], eps=v["eps"], momentum=v["momentum"], centered=bool(v["centered"]), **common
        )
    if kind == "adagrad":
        initial = v["initial_accumulator_value"]
        return torch.optim.Adagrad(
            params, lr_decay=v["lr_decay"], eps=v["eps"], initial_accumulator_value=initial, **common
        )
    return Lion(params, v["lr"], (v["beta1"], v["beta2"]), v["weight_decay"])


def train_alone(
    study: hydro.Study, surrogate: Surrogate, data: hydro.Data, seed: int, params: dict[str, Any], num_steps: int
) -> nn.Module:
    """Train one trial by itself for `num_steps` updates."""
    values = resolve_hyperparameters(study.optimizer, study.schedule, study.fixed, params)
    model = surrogate.make(derive_seed(seed, "init")).train()
    groups = []
    for name, parameter in model.named_parameters():
        rule = surrogate.rules[name]
        group = {"params": [parameter], "lr": values["lr"] * rule.lr, "factor": rule.lr}
        group["weight_decay"] = values["weight_decay"] * rule.weight_decay
        if "eps" in values:
            group["eps"] = values["eps"] * rule.eps
        groups.append(group)
    optimizer = make_optimizer(study.optimizer, groups, values)
    batch_size = int(values.get("batch_size", study.batch_size))
    order = study.seed if study.data_order == "shared" else seed
    stream = SampleStream(order, len(data.train[0]), batch_size)
    dtype = torch.bfloat16 if study.precision == "bf16" else None
    for step in range(num_steps):
        multiplier = lr_multiplier(study.schedule, step, study.steps, values)
        for group in optimizer.param_groups:
            group["lr"] = values["lr"] * group["factor"] * multiplier
        optimizer.zero_grad()
        for microbatch in range(study.accumulate):
            index = stream.indices(step * study.accumulate + microbatch)
            torch.manual_seed(derive_seed(seed, "draws", step, microbatch))
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = study.loss(model(data.train[0][index]), data.train[1][index]) / study.accumulate
            loss.backward()  # type: ignore[no-untyped-call]
        clip(list(model.parameters()), values)
        optimizer.step()
    return model


def clip(parameters: list[Tensor], values: dict[str, float]) -> None:
    """torch's own clipping, where the trial asks for it."""
    if values.get("clip_norm"):
        nn.utils.clip_grad_norm_(parameters, values["clip_norm"])
    if values.get("clip_value"):
        nn.utils.clip_grad_value_(parameters, values["clip_value"])
