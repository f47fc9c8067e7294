"""One loop for both ways of sharing: it reconciles what runs with what policy wants.

A back end says what the world looks like and carries decisions out. Own mode's back end works for one study inside
that study's job; the cluster's daemon runs the same loop with a back end of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hydro_slurm.clock import Clock, SystemClock
from hydro_slurm.errors import SlurmUnavailableError
from hydro_slurm.policy import Decider, Demand, Finish, Launch, Refill, RunningBundle, Slot

logger = logging.getLogger(__name__)

MAX_BACK_OFF_S = 60.0
SLICE_S = 1.0


@dataclass(frozen=True, slots=True)
class World:
    """What a back end has read: the input of one decision."""

    demands: tuple[Demand, ...]
    slots: tuple[Slot, ...]
    bundles: tuple[RunningBundle, ...]
    slurm_away: str = ""
    """Why Slurm cannot be asked; what it said last still stands, and no new bundle can start."""


class Backend(Protocol):
    """The world as one coordinator sees and changes it."""

    def read(self) -> World:
        """Take in results and ends of bundles, and describe what there is."""
        ...

    def launch(self, launch: Launch) -> None:
        """Start a bundle.

        Raises:
            SlurmUnavailableError: Slurm does not answer; its trials wait as before.
        """
        ...

    def refill(self, refill: Refill) -> None:
        """Hand more trials to a bundle."""
        ...

    def finish(self, finish: Finish) -> None:
        """Make a bundle leave."""
        ...


class Reconciler:
    """Runs cycles; backs off, and changes nothing, while Slurm is away."""

    def __init__(self, backend: Backend, *, interval_s: float = 1.0, clock: Clock | None = None) -> None:
        self.backend = backend
        self.interval_s = interval_s
        self.clock = clock or SystemClock()
        self.last_sentence = ""
        self._decider = Decider()
        self._num_failures = 0

    def run_cycle(self) -> str:
        """One cycle. Returns the sentence that says what it did; it is logged when it changes."""
        try:
            sentence = self._cycle()
            self._num_failures = 0
        except SlurmUnavailableError as error:
            self._num_failures += 1
            sentence = f"Slurm does not answer, nothing is changed: {error}"
        if sentence != self.last_sentence:
            logger.info("%s", sentence)
            self.last_sentence = sentence
        return sentence

    def run(self, finished: Callable[[], bool], after_cycle: Callable[[], None]) -> None:
        """Run cycles until `finished`, which is asked often, says so; `after_cycle` follows every cycle, once."""
        while not finished():
            self.run_cycle()
            after_cycle()
            pause_s = self.pause_s()
            while pause_s > 0 and not finished():  # in slices: whoever asks it to end does not wait out a back-off
                self.clock.sleep(min(pause_s, SLICE_S))
                pause_s -= SLICE_S

    def pause_s(self) -> float:
        """Seconds until the next cycle: the interval, doubled with every failure in a row."""
        return min(self.interval_s * 2.0 ** min(self._num_failures, 10), max(MAX_BACK_OFF_S, self.interval_s))

    def _cycle(self) -> str:
        world = self.backend.read()
        plan = self._decider.decide(self.clock.monotonic_ns() / 1e9, world.demands, world.slots, world.bundles)
        for finish in plan.finishes:
            self.backend.finish(finish)
        for refill in plan.refills:
            self.backend.refill(refill)
        for launch in plan.launches:
            self.backend.launch(launch)
        waiting = sum(demand.num_waiting for demand in world.demands)
        num_lanes = sum(bundle.num_lanes for bundle in world.bundles)
        state = f"waiting={waiting} slots={len(world.slots)} bundles={len(world.bundles)} lanes={num_lanes}"
        if world.slurm_away:
            state = f"{state}; Slurm does not answer, its last view stands: {world.slurm_away}"
        if not plan:
            return f"nothing to do: {state}"
        return (
            f"launched={len(plan.launches)} refilled={len(plan.refills)} finished={len(plan.finishes)} bundles: {state}"
        )
