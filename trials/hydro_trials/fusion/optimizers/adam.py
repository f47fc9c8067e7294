"""Adam and AdamW as in torch.optim; AMSGrad per lane."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hydro_trials.fusion.optimizers.piece import Family, Piece


def _numbers(values: Mapping[str, float], lr: float, step: int) -> dict[str, float]:
    beta1, beta2, count = values["beta1"], values["beta2"], step + 1
    return {
        "beta1_rest": 1 - beta1,
        "beta2": beta2,
        "beta2_rest": 1 - beta2,
        "step_size": -lr / (1 - beta1**count),
        "root_correction": (1 - beta2**count) ** 0.5,
        "eps": values["eps"],
        "weight_decay": values["weight_decay"],
        "lr_x_weight_decay": lr * values["weight_decay"],
        "amsgrad": values["amsgrad"],
    }


def _update_adam(piece: Piece) -> None:
    piece.add_decay()
    _update(piece)


def _update_adamw(piece: Piece) -> None:
    piece.shrink()
    _update(piece)


def _update(piece: Piece) -> None:
    numbers, mean_FW, square_FW = piece.numbers, piece.slots["mean"], piece.slots["mean_square"]
    mean_FW.lerp_(piece.grad, numbers["beta1_rest"])
    square_FW.mul_(numbers["beta2"]).addcmul_(piece.grad.square(), numbers["beta2_rest"])
    if "amsgrad" in piece.used:
        largest_FW = piece.slots["max_square"]
        torch.maximum(largest_FW, square_FW, out=largest_FW)
        square_FW = torch.where(piece.is_on("amsgrad"), largest_FW, square_FW)
    root_FW = square_FW.sqrt().div_(numbers["root_correction"])
    piece.add_eps(root_FW)
    piece.flat.addcdiv_(mean_FW * piece.scaled("step_size", "lr"), root_FW)


_SLOTS = {"mean": "", "mean_square": "", "max_square": "amsgrad"}
ADAM = Family(slots=_SLOTS, numbers=_numbers, update=_update_adam)
ADAMW = Family(slots=_SLOTS, numbers=_numbers, update=_update_adamw)
