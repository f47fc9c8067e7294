"""Lion: steps of one size, in the direction of a momentum's sign; weight decay is decoupled.

Source: Chen et al., Symbolic Discovery of Optimization Algorithms (2023), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping

from hydro_trials.fusion.optimizers.piece import Family, Piece


def _numbers(values: Mapping[str, float], lr: float, step: int) -> dict[str, float]:
    return {
        "negative_lr": -lr,
        "beta1_rest": 1 - values["beta1"],
        "beta2_rest": 1 - values["beta2"],
        "lr_x_weight_decay": lr * values["weight_decay"],
    }


def _update(piece: Piece) -> None:
    piece.shrink()
    mean_FW = piece.slots["mean"]
    direction_FW = mean_FW.lerp(piece.grad, piece.numbers["beta1_rest"]).sign_()
    piece.flat.addcmul_(direction_FW, piece.scaled("negative_lr", "lr"))
    mean_FW.lerp_(piece.grad, piece.numbers["beta2_rest"])


LION = Family(slots={"mean": ""}, numbers=_numbers, update=_update)
