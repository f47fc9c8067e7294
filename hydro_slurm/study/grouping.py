"""Which trials may share a bundle: those that agree in every hyperparameter that separates bundles.

`python -m hydro_trials check` says which these are (batch size, where a model normalises over the batch).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from hydro_slurm.model import LaneSpec

Group = tuple[Any, ...]


def group_of(lane: LaneSpec, separates: Sequence[str]) -> Group:
    """What a trial must agree in with the others in its bundle."""
    return tuple(lane.params.get(name) for name in separates)


def take_alike(
    waiting: deque[LaneSpec],
    count: int,
    separates: Sequence[str],
    group: Group | None,
    ask: Callable[[], LaneSpec | None] = lambda: None,
) -> list[LaneSpec]:
    """Take up to `count` trials of one group; the others stay in `waiting`, in their order.

    Trials are made only while fewer than `count` wait that do not fit: a sampler learns nothing from those it is asked
    for ahead.

    Args:
        waiting: Trials that wait; what is taken is removed.
        count: How many are wanted.
        separates: Names of the hyperparameters in which they must agree.
        group: Which group; None takes that of the first.
        ask: Makes one more trial, or says that there is none.
    """
    taken: list[LaneSpec] = []
    others: deque[LaneSpec] = deque()
    while len(taken) < count:
        may_ask = len(others) < count
        lane = waiting.popleft() if waiting else ask() if may_ask else None
        if lane is None:
            break
        group = group_of(lane, separates) if group is None else group
        (taken if group_of(lane, separates) == group else others).append(lane)
    waiting.extendleft(reversed(others))
    return taken
