"""Adagrad as in torch.optim.Adagrad."""

from __future__ import annotations

from collections.abc import Mapping

from hydro_trials.fusion.optimizers.piece import Family, Piece


def _numbers(values: Mapping[str, float], lr: float, step: int) -> dict[str, float]:
    return {
        "step_size": -lr / (1 + step * values["lr_decay"]),
        "eps": values["eps"],
        "weight_decay": values["weight_decay"],
    }


def _update(piece: Piece) -> None:
    piece.add_decay()
    grad_FW, sum_FW = piece.grad, piece.slots["square_sum"]
    # What eps scales with is the size of a surrogate's gradients relative to the target's. Brought to the target's
    # size they fit initial_accumulator_value too, and the step does not change: the sum is of the same gradients.
    factor_W = piece.factors.get("eps")
    if factor_W is not None:
        grad_FW.div_(factor_W)
    sum_FW.addcmul_(grad_FW, grad_FW)
    root_FW = sum_FW.sqrt().add_(piece.numbers["eps"])
    piece.fill_gaps(root_FW)
    piece.flat.addcdiv_(grad_FW * piece.scaled("step_size", "lr"), root_FW)


ADAGRAD = Family(
    slots={"square_sum": ""},
    numbers=_numbers,
    update=_update,
    first_values={"square_sum": "initial_accumulator_value"},
)
