"""RMSprop as in torch.optim.RMSprop; centered per lane."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hydro_trials.fusion.optimizers.piece import Family, Piece


def _numbers(values: Mapping[str, float], lr: float, step: int) -> dict[str, float]:
    return {
        "negative_lr": -lr,
        "alpha": values["alpha"],
        "alpha_rest": 1 - values["alpha"],
        "eps": values["eps"],
        "weight_decay": values["weight_decay"],
        "momentum": values["momentum"],
        "centered": values["centered"],
    }


def _update(piece: Piece) -> None:
    piece.add_decay()
    numbers, grad_FW, square_FW = piece.numbers, piece.grad, piece.slots["mean_square"]
    square_FW.mul_(numbers["alpha"]).addcmul_(grad_FW.square(), numbers["alpha_rest"])
    if "centered" in piece.used:
        mean_FW = piece.slots["mean"]
        mean_FW.lerp_(grad_FW, numbers["alpha_rest"])
        variance_FW = torch.addcmul(square_FW, mean_FW, mean_FW, value=-1)
        square_FW = torch.where(piece.is_on("centered"), variance_FW, square_FW)
    root_FW = square_FW.sqrt()
    piece.add_eps(root_FW)
    if "momentum" in piece.used:
        buffer_FW = piece.slots["momentum"]
        buffer_FW.mul_(numbers["momentum"]).addcdiv_(grad_FW, root_FW)
        piece.flat.addcmul_(buffer_FW, piece.scaled("negative_lr", "lr"))
    else:
        piece.flat.addcdiv_(grad_FW * piece.scaled("negative_lr", "lr"), root_FW)


RMSPROP = Family(
    slots={"mean_square": "", "mean": "centered", "momentum": "momentum"}, numbers=_numbers, update=_update
)
