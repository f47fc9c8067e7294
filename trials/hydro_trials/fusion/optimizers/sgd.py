"""Stochastic gradient descent as in torch.optim.SGD."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hydro_trials.fusion.optimizers.piece import Family, Piece


def _numbers(values: Mapping[str, float], lr: float, step: int) -> dict[str, float]:
    momentum = values["momentum"]
    # The first step starts the buffer with the whole gradient, and without momentum torch keeps none: there
    # dampening means nothing.
    keep = 1 - values["dampening"] if momentum and step else 1.0
    return {
        "negative_lr": -lr,
        "weight_decay": values["weight_decay"],
        "momentum": momentum,
        "keep": keep,
        "nesterov": values["nesterov"],
    }


def _update(piece: Piece) -> None:
    piece.add_decay()
    direction_FW = piece.grad
    if "momentum" in piece.used:
        buffer_FW, momentum_F1 = piece.slots["momentum"], piece.numbers["momentum"]
        # In a lane without momentum the buffer is the gradient. (0 times an infinite one is not a number: parameters
        # that are infinite already become that earlier than with torch.)
        buffer_FW.mul_(momentum_F1)
        if "dampening" in piece.used:
            buffer_FW.addcmul_(piece.grad, piece.numbers["keep"])
        else:
            buffer_FW.add_(piece.grad)
        direction_FW = buffer_FW
        if "nesterov" in piece.used:
            ahead_FW = torch.addcmul(piece.grad, buffer_FW, momentum_F1)
            # Selecting, not multiplying: 0 x inf is not a number.
            direction_FW = torch.where(piece.is_on("nesterov"), ahead_FW, buffer_FW)
    piece.flat.addcmul_(direction_FW, piece.scaled("negative_lr", "lr"))


SGD = Family(slots={"momentum": "momentum"}, numbers=_numbers, update=_update)
