"""Decisions on changed input only, and at most once per period."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hydro_slurm.policy.moves import MovePolicy
from hydro_slurm.policy.placement import place
from hydro_slurm.policy.world import Demand, Plan, RunningBundle, Slot, UserShare


class Decider:
    """Calls `place` when there is something to decide.

    An input that led to no change before leads to none again; while its plans change something it decides anew every
    period, because what it decided may have failed.

    Args:
        period_s: Shortest time between two decisions.
        moves: When bundles are moved.
    """

    def __init__(self, period_s: float = 0.0, moves: MovePolicy | None = None) -> None:
        self.period_s, self.moves = period_s, moves or MovePolicy()
        self.num_decisions = 0
        self._settled: tuple[object, ...] | None = None
        self._last_s: float | None = None

    def next_s(self, now_s: float) -> float:
        """The earliest moment, from now on, of a decision."""
        return now_s if self._last_s is None else max(now_s, self._last_s + self.period_s)

    def decide(
        self,
        now_s: float,
        demands: Sequence[Demand],
        slots: Sequence[Slot],
        bundles: Sequence[RunningBundle],
        users: Mapping[str, UserShare] | None = None,
    ) -> Plan:
        """The plan; empty where the period is not over, or nothing has changed since a plan was empty."""
        if now_s < self.next_s(now_s):
            return Plan()
        given = (tuple(demands), tuple(slots), tuple(bundles), dict(users or {}))
        if given == self._settled:
            return Plan()
        self._last_s = now_s
        self.num_decisions += 1
        plan = place(demands, slots, bundles, users, self.moves)
        self._settled = None if plan else given
        return plan
