"""The framework-neutral side of a hook: what the host computes when, and from that when its gate is open.

A framework's adapter tells a `BubbleReporter` where compute begins and ends and where an iteration ends; everything
between is a gap. The reporter learns the gaps, opens the gate with a deadline when one begins that is worth it, and
closes it when compute begins. A begin/end pair costs a few microseconds, and nothing in here ever waits.

A reporter that fails swallows the error, closes the gate, disables itself and logs once: training goes on.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Callable, Optional, Protocol, TypeVar, cast

from hydro_slurm.clock import Clock, SystemClock
from hydro_slurm.hooks.guard import Guard, is_control
from hydro_slurm.hooks.prediction import GapPredictor
from hydro_slurm.timeline import TimelineWriter

_log = logging.getLogger(__name__)

MODES = ("bubbles", "closed", "open")
OPEN_LEASE_NS = 30_000_000_000
"""Lease in mode "open"; renewed at compute calls when less than half of it is left."""
SKIPPED_ITERATIONS = 2
"""The first iterations allocate, compile and connect: nothing is learned from them."""


class Publisher(Protocol):
    """What a reporter needs of a gate: `hydro_slurm.gate.writer.GateWriter` is one."""

    def open(self, deadline_ns: int, *, iteration: int = 0, free_bytes: int = 0) -> None: ...

    def close(self) -> None: ...

    def bump_epoch(self) -> None: ...

    def heartbeat(self) -> None:
        """May come from another thread than everything else."""
        ...

    def leave(self) -> None: ...


@dataclass(frozen=True)
class Gap:
    """One gap as it was: `position` compute slots of its iteration came before it."""

    position: int
    start_ns: int
    dur_ns: int
    predicted_ns: int
    """The lease that was given; 0 if the gate stayed closed."""


@dataclass(frozen=True)
class Iteration:
    """One whole training iteration, from the end of the step before to the end of its own."""

    iteration: int
    start_ns: int
    dur_ns: int
    mode: str
    control: bool
    gaps: tuple[Gap, ...]


Method = TypeVar("Method", bound=Callable[..., None])


def _swallows_errors(method: Method) -> Method:
    """Training goes on whatever happens in `method`."""

    @functools.wraps(method)
    def guarded(self: BubbleReporter, *args: Any, **kwargs: Any) -> None:
        if self.disabled:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.disable(error)

    return cast(Method, guarded)


class BubbleReporter:
    """Turns compute begin and end into gate states. All methods are for the training thread, except the properties.

    Args:
        publisher: The gate.
        secret: Shared by all ranks of the job: decides which iterations are control.
        control_share: Share of the iterations that keep all gates closed.
        timeline: Where events are recorded, if at all.
        on_iteration: Called after each measured iteration, on the training thread.
        on_learned: Called once when the gaps have been learned.
    """

    def __init__(
        self,
        publisher: Publisher,
        *,
        secret: bytes = b"hydro",
        control_share: float = 0.05,
        predictor: Optional[GapPredictor] = None,
        guard: Optional[Guard] = None,
        clock: Optional[Clock] = None,
        timeline: Optional[TimelineWriter] = None,
        stage: int = 0,
        iteration: int = 0,
        on_iteration: Optional[Callable[[Iteration], None]] = None,
        on_learned: Optional[Callable[[], None]] = None,
    ) -> None:
        self.predictor = predictor or GapPredictor()
        self.guard = guard or Guard()
        self.iteration = iteration
        self.free_bytes = 0
        self.disabled = False
        self.on_iteration, self.on_learned = on_iteration, on_learned
        self.control_share = control_share
        self._publisher, self._secret, self._timeline = publisher, secret, timeline
        self._now_ns = (clock or SystemClock()).monotonic_ns
        self._stage, self._mode = stage, "bubbles"
        self._kind, self._microbatch = "", None  # type: str, Optional[int]
        self._computing = self._suspended = self._open = False
        self._compute_start_ns = self._deadline_ns = self._lease_ns = 0
        self._gap_start_ns: Optional[int] = None
        self._iteration_start_ns: Optional[int] = None
        self._position = 0
        self._gaps: list[Gap] = []
        self._num_iterations = 0
        self._durations_ns: deque[int] = deque(maxlen=31)
        self._control = is_control(secret, iteration, control_share)

    @property
    def mode(self) -> str:
        return self._mode

    @property
    def learning(self) -> bool:
        """Whether too few iterations have passed to predict anything."""
        return self._num_iterations < SKIPPED_ITERATIONS + self.predictor.min_samples

    @property
    def iteration_ns(self) -> Optional[int]:
        """Median duration of the latest iterations; None while learning."""
        durations = sorted(self._durations_ns)
        return durations[len(durations) // 2] if durations and not self.learning else None

    @_swallows_errors
    def set_schedule(self, schedule: Hashable) -> None:
        """Name what fixes the order of compute and gaps (kind, stages, microbatches). A new one is learned anew."""
        had_one = self.predictor.schedule is not None
        if self.predictor.set_schedule(schedule) and had_one:
            self._close(self._now_ns())
            self._publisher.bump_epoch()
            self._num_iterations = 0
            self._durations_ns.clear()
            self._gap_start_ns = self._iteration_start_ns = None

    @_swallows_errors
    def compute_begin(self, kind: str, stage: Optional[int] = None, microbatch: Optional[int] = None) -> None:
        """The device computes from now on. Closes the gate. Within compute: goes on as the same slot."""
        if self._suspended or self._computing:
            return
        now_ns = self._now_ns()
        lease_ns = self._lease_ns
        if self._mode == "open":
            self._hold_open(now_ns)
        elif self._open:
            self._close(now_ns)
        self._computing, self._compute_start_ns = True, now_ns
        self._kind, self._microbatch = kind, microbatch
        if stage is not None:
            self._stage = stage
        if self._gap_start_ns is not None:
            self._end_gap(self._gap_start_ns, now_ns, lease_ns)

    @_swallows_errors
    def compute_end(self) -> None:
        """The device waits from now on. Opens the gate if the gap that begins here is known to be worth it."""
        if self._computing and not self._suspended:
            self._end_slot(self._now_ns())
            self._begin_gap()

    @_swallows_errors
    def step_end(self, iteration: Optional[int] = None) -> None:
        """The optimizer's step is done: the iteration ends; what follows is the gap before the next one's compute.

        Args:
            iteration: Number of the iteration that begins (global step), the same on every rank; else counted here.
        """
        if self._suspended:
            return
        now_ns = self._now_ns()
        if self._computing:
            self._end_slot(now_ns)
        self._end_iteration(now_ns)
        self.iteration = self.iteration + 1 if iteration is None else iteration
        self._control = self._mode == "bubbles" and is_control(self._secret, self.iteration, self.control_share)
        self._position = 0
        self._gaps = []
        self._iteration_start_ns = now_ns
        if self._open and self._mode != "open":
            self._close(now_ns)
        self._begin_gap()

    @_swallows_errors
    def set_mode(self, mode: str) -> None:
        """Between iterations: "bubbles" (normal), "closed" (never opens), "open" (always open: measurements only)."""
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if mode == self._mode:
            return
        self._mode = mode
        self._control = mode == "bubbles" and is_control(self._secret, self.iteration, self.control_share)
        now_ns = self._now_ns()
        self._close(now_ns)
        if mode == "open":
            self._hold_open(now_ns)
        elif not self._computing and not self._suspended:
            self._begin_gap()

    @_swallows_errors
    def suspend(self) -> None:
        """Something else than training follows (evaluation, checkpoint): closes, and learns nothing from this gap."""
        self._suspended, self._computing = True, False
        self._gap_start_ns = self._iteration_start_ns = None
        if self._mode != "open":
            self._close(self._now_ns())
            self._publisher.bump_epoch()

    @_swallows_errors
    def resume(self, *, aligned: bool = False) -> None:
        """Training goes on.

        Args:
            aligned: All ranks have just met, between two iterations: a gap as usual begins here, and a whole
                iteration. Otherwise this gap is unknown, stays closed, and the iteration is not measured.
        """
        self._suspended = False
        self._position = 0
        self._gaps = []
        if aligned:
            self._iteration_start_ns = self._gap_start_ns = self._now_ns()
            self._begin_gap()

    def heartbeat(self) -> None:
        """Tell readers that this process lives: called by a side thread."""
        if not self.disabled:
            self._publisher.heartbeat()

    def leave(self) -> None:
        """The gate is gone for good. Never raises; may be called again."""
        self.disabled = True
        with contextlib.suppress(Exception):
            self._publisher.leave()

    def disable(self, error: BaseException) -> None:
        """Give up sharing, once, with one line in the log."""
        if not self.disabled:
            self.leave()
            _log.warning("bubble sharing is off from now on, training goes on: %s: %s", type(error).__name__, error)

    def _end_slot(self, now_ns: int) -> None:
        self._computing = False
        self._position += 1
        self._gap_start_ns = now_ns
        if self._timeline is not None:
            start_ns = self._compute_start_ns
            self._record(self._kind, start_ns, now_ns - start_ns, microbatch=self._microbatch)

    def _begin_gap(self) -> None:
        if self._mode == "open":
            self._hold_open(self._now_ns())
        elif self._mode == "bubbles" and not self._control and self._gap_start_ns is not None and not self.guard.shut:
            predicted_ns = self.predictor.predict(self._position)
            if predicted_ns > 0 and not self.learning:
                # Last, because the wake-up that it causes may cost this thread its core.
                self._publish_open(self._gap_start_ns + predicted_ns, predicted_ns)

    def _end_gap(self, start_ns: int, end_ns: int, lease_ns: int) -> None:
        self._gap_start_ns = None
        dur_ns = end_ns - start_ns
        if self._mode != "open" and self._num_iterations >= SKIPPED_ITERATIONS:
            self.predictor.record(self._position, dur_ns)
        if dur_ns >= self.predictor.min_gap_ns:
            self._gaps.append(Gap(self._position, start_ns, dur_ns, lease_ns))
            if self._timeline is not None:
                self._record("gap", start_ns, dur_ns)

    def _end_iteration(self, now_ns: int) -> None:
        start_ns = self._iteration_start_ns
        if start_ns is None:
            return
        was_learning = self.learning
        self._num_iterations += 1
        if was_learning and not self.learning and self.on_learned is not None:
            self.on_learned()
        dur_ns = now_ns - start_ns
        if self._num_iterations > SKIPPED_ITERATIONS:
            if self._mode == "bubbles" and not self.learning:
                self.guard.add(dur_ns, control=self._control)
            if self._mode != "open":
                self._durations_ns.append(dur_ns)
        if self._timeline is not None:
            self._record("control" if self._control else "iteration", start_ns, dur_ns)
        if self.on_iteration is not None:
            gaps = tuple(self._gaps)
            self.on_iteration(Iteration(self.iteration, start_ns, dur_ns, self._mode, self._control, gaps))

    def _hold_open(self, now_ns: int) -> None:
        if not self._open or self._deadline_ns - now_ns < OPEN_LEASE_NS // 2:
            self._publish_open(now_ns + OPEN_LEASE_NS, OPEN_LEASE_NS)

    def _publish_open(self, deadline_ns: int, lease_ns: int) -> None:
        self._open, self._deadline_ns, self._lease_ns = True, deadline_ns, lease_ns
        if self._timeline is not None:
            self._record("open", deadline_ns - lease_ns, lease_ns)
        self._publisher.open(deadline_ns, iteration=self.iteration, free_bytes=self.free_bytes)

    def _close(self, now_ns: int) -> None:
        if not self._open:
            return
        self._publisher.close()
        self._open, self._lease_ns = False, 0
        if self._timeline is not None:
            self._record("close", now_ns, 0)

    def _record(self, kind: str, t_ns: int, dur_ns: int, *, microbatch: Optional[int] = None) -> None:
        assert self._timeline is not None
        extra: dict[str, Any] = {"mode": self._mode} if kind in ("iteration", "control") else {}
        self._timeline.add(
            kind, t_ns, dur_ns, stage=self._stage, iteration=self.iteration, microbatch=microbatch, **extra
        )
