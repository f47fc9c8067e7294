"""How well a surrogate ranks configurations: Kendall tau and regret."""

from __future__ import annotations

import math
from collections.abc import Sequence


def kendall_tau(left: Sequence[float], right: Sequence[float]) -> float:
    """Kendall's tau-b between two rankings of the same things; values that are not finite are the worst, and tie.

    Source: Kendall (1945), The treatment of ties in ranking problems.
    """
    concordant, ties_left, ties_right, pairs = 0, 0, 0, 0
    a, b = _ordered(left), _ordered(right)
    for i in range(len(a)):
        for j in range(i):
            pairs += 1
            x, y = _sign(a[i], a[j]), _sign(b[i], b[j])
            concordant += x * y
            ties_left += x == 0
            ties_right += y == 0
    scale = math.sqrt((pairs - ties_left) * (pairs - ties_right))
    return concordant / scale if scale else 0.0


def regret_at(num_verified: int, surrogate: Sequence[float], target: Sequence[float]) -> float:
    """What is lost on the target by verifying the surrogate's best `num_verified` configurations only.

    Args:
        num_verified: How many of the surrogate's best are run on the target.
        surrogate: Losses there.
        target: Losses of the same configurations on the target.

    Returns:
        Best target loss among those, less the best of all; 0 where the best is among them.
    """
    order = sorted(range(len(surrogate)), key=lambda index: _ordered(surrogate)[index])
    values = _ordered(target)
    return min(values[index] for index in order[:num_verified]) - min(values)


def _ordered(values: Sequence[float]) -> list[float]:
    return [value if math.isfinite(value) else math.inf for value in values]


def _sign(a: float, b: float) -> int:
    return 0 if a == b else 1 if a > b else -1
