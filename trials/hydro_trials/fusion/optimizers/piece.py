"""What an update rule works on, and what it has to say about itself.

Shape suffixes: F = lanes, P = values per row, W = values per row of one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LaneSettings:
    """What one lane's next update needs."""

    step: int
    """Updates done so far."""
    values: dict[str, float]
    """Its complete hyperparameters."""


@dataclass(frozen=True)
class Piece:
    """Some columns of all lanes: parameters, gradients, state, and this step's numbers."""

    flat: Tensor
    """Parameters, (F, W)."""
    grad: Tensor
    """Gradients, (F, W); free to be overwritten."""
    slots: dict[str, Tensor]
    """State, each (F, W)."""
    numbers: dict[str, Tensor]
    """What `Family.numbers` gave, each (F, 1)."""
    factors: dict[str, Tensor]
    """Factors of the surrogate's rules, each (W,); one that is 1 everywhere is left out."""
    gaps: Tensor | None
    """(W,): 1 in the gaps between parameters and 0 elsewhere, where a denominator could be 0 in a gap."""
    used: frozenset[str]
    """Hyperparameters that some lane of the study may use."""

    def scaled(self, number: str, factor: str) -> Tensor:
        """One of this step's numbers times a rule's factor: (F, 1), or (F, W)."""
        factor_W = self.factors.get(factor)
        return self.numbers[number] if factor_W is None else self.numbers[number] * factor_W

    def is_on(self, flag: str) -> Tensor:
        """Which lanes have a flag on: (F, 1)."""
        return self.numbers[flag] > 0

    def add_decay(self) -> None:
        """Weight decay as part of the gradient.

        A lane without it gets 0 times its parameters added: infinite ones make the gradient not a number, which
        torch, leaving the addition out, would do some operations later.
        """
        if "weight_decay" in self.used:
            self.grad.addcmul_(self.flat, self.scaled("weight_decay", "weight_decay"))

    def shrink(self) -> None:
        """Weight decay decoupled from the gradient: parameters lose their part of `lr` x `weight_decay`."""
        if "weight_decay" in self.used:
            self.flat.mul_(1 - self.scaled("lr_x_weight_decay", "lr_x_weight_decay"))

    def add_eps(self, root_FW: Tensor) -> None:
        """Keep a denominator away from 0, in place."""
        root_FW.add_(self.scaled("eps", "eps"))
        self.fill_gaps(root_FW)

    def fill_gaps(self, root_FW: Tensor) -> None:
        """Nothing over nothing would make a gap, and with it the lane, not a number."""
        if self.gaps is not None:
            root_FW.add_(self.gaps)


@dataclass(frozen=True)
class Family:
    """One optimizer."""

    slots: Mapping[str, str]
    """Its state, each with the hyperparameter without which it is not kept; "" where it always is."""
    numbers: Callable[[Mapping[str, float], float, int], dict[str, float]]
    """`numbers(values, lr, step)`: what an update needs of one lane, in Python and hence alike in every row."""
    update: Callable[[Piece], None]
    first_values: Mapping[str, str] = field(default_factory=dict)
    """The hyperparameter that gives a slot's value before the first step; 0 for the others."""
