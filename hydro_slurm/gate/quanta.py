"""Working in quanta behind a gate: what a bundle calls at every boundary of its computation.

`check()` returns at once while the next quantum fits into the lease, for a third of a microsecond; else it
acknowledges, sleeps until the gate opens again, and returns then. Standard library only, Python 3.9.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Callable, NamedTuple, Optional

from hydro_slurm.clock import Clock, SystemClock
from hydro_slurm.errors import GateGoneError
from hydro_slurm.gate.bundle_page import BundlePage
from hydro_slurm.gate.estimate import CLIP_FACTOR, Margin, SiteEstimate
from hydro_slurm.gate.layout import LEAVING, PAUSED, RUNNING, UNDIVIDED, WAKE_GONE, WAKE_OPEN
from hydro_slurm.gate.process import Preemption
from hydro_slurm.gate.reader import SLICE_S, WORD_INDEX, GateReader

MARGIN_NS = 300_000
"""Left free before the deadline, at least."""

TICK_NS = 10_000_000
"""A long run of quanta stops this often for its bookkeeping: heartbeat, estimates."""

SLACK_NS = 10_000
"""Added to each estimate: the slow way of a check costs more than it could learn from a difference like that."""

_BEAT_NS = 250_000_000
_UPDATES_PER_TICK = 2
_FOREVER_NS = 1 << 62


class Run(NamedTuple):
    """Quanta without a pause between them; `end_ns` leaves out the time during which others had the core."""

    start_ns: int
    end_ns: int
    num_quanta: int


class _Needs(dict[int, int]):
    """Estimate of each check site, with its slack. A site that has not been seen yet goes the slow way."""

    def __missing__(self, site: int) -> int:
        return _FOREVER_NS


class QuantumGate:
    """Holds one bundle to its gate. For one thread: the one that computes.

    Args:
        reader: The gate.
        page: The bundle's own page, on which it acknowledges.
        margin_ns: Left free before the deadline, at least; grows when quanta overrun it.
        poll: Called after each resume, for what must be looked at now and then.
        record_runs: Keep `runs`.
        clock: Time, for tests.
        preempted_ns: How long others had the thread's core, for tests.
    """

    def __init__(
        self,
        reader: GateReader,
        page: BundlePage,
        *,
        margin_ns: int = MARGIN_NS,
        poll: Optional[Callable[[], None]] = None,
        record_runs: bool = False,
        clock: Optional[Clock] = None,
        preempted_ns: Optional[Callable[[], int]] = None,
    ) -> None:
        self.reader, self.page = reader, page
        self.poll = poll
        self.runs: Optional[list[Run]] = [] if record_runs else None
        self.overruns = 0
        """Quanta that ended after the deadline, time during which others had the core left aside."""
        self.num_quanta = 0
        """Checks since the start; each ended a quantum, or began the first."""
        self._now_ns = time.monotonic_ns if clock is None or isinstance(clock, SystemClock) else clock.monotonic_ns
        self._preempted_ns = preempted_ns or Preemption()
        self._margin = Margin(margin_ns)
        self._sites: dict[int, SiteEstimate] = {}
        self._needs_ns = _Needs()
        self._stalest: deque[int] = deque()
        """Sites in the order in which their estimates are computed anew."""
        self._site_of(0)
        self._site, self._need_ns, self._add_sample = 0, self._needs_ns[0], self._sites[0].add
        """Where the present quantum began; its estimate; where to put its duration."""
        self._words = reader.words
        self._open_word, self._until_ns = -1, 0
        """The lease. `_until_ns` is its end less the margin, or the next tick; 0 sends the next check the slow way."""
        self._deadline_ns = 0
        self._refused_word = -1
        self._is_running = self._is_first = self._overran = False
        self._compute_ns = 0
        self._start_ns = self._start_quanta = self._last_ns = self._beat_ns = 0
        self._lost_ns = self._last_preempted_ns = 0

    @property
    def compute_ns(self) -> int:
        """Time between resume and pause, less what others had the core for."""
        return self._compute_ns + (self._now_ns() - self._start_ns if self._is_running else 0)

    @property
    def quantum_p99_ns(self) -> int:
        """The longest of all sites' estimates."""
        return max(estimate.p99_ns for estimate in self._sites.values())

    def check(self, site: int = 0) -> None:
        """End one quantum and begin the next, as soon as the gate lets it.

        Args:
            site: Which boundary this is. The quanta that begin at different sites are estimated apart, so that one
                long operation does not make the bundle careful everywhere.

        Raises:
            GateGoneError: The host has left: save the work and leave.
        """
        now = self._now_ns()
        quantum_ns = now - self._last_ns
        self.num_quanta += 1
        if (
            self._words[WORD_INDEX] == self._open_word
            and now + self._needs_ns[site] < self._until_ns
            and quantum_ns <= self._need_ns
        ):
            self._add_sample(quantum_ns)
            self._last_ns = now
            if site != self._site:
                self._site, self._need_ns, self._add_sample = site, self._needs_ns[site], self._sites[site].add
            return
        self._check_slowly(now, site)

    def wait_until_open(self) -> None:
        """For code that is no quantum (data loading, a checkpoint): go on when the gate is open.

        The time since the last check teaches the estimates nothing.

        Raises:
            GateGoneError: The host has left.
        """
        now = self._now_ns()
        if self.reader.look() != "open" or not self._is_running or now + self._margin.value_ns >= self.reader.until_ns:
            self._pause(now)
            self._resume(None)
        self._begin_quantum(self._site)

    def pause(self) -> None:
        """Nothing is computed from now on: said at once, while the gate may still be open. `check` goes on."""
        self._pause(self._now_ns())

    def begin_leaving(self) -> None:
        """What is computed from now on is the end: the supervisor no longer stops it, and gives it its grace."""
        self._pause(self._now_ns())
        self._publish(LEAVING)

    @contextlib.contextmanager
    def undivided(self) -> Iterator[None]:
        """Around work without checks that may outlast a lease: the supervisor stops and continues it by signals.

        Raises:
            GateGoneError: The host has left, before the work or behind it.
        """
        self.wait_until_open()
        self.page.state = UNDIVIDED
        self.page.publish()
        try:
            yield
        finally:
            self.page.state = RUNNING
            self.page.publish()
        self.wait_until_open()

    def set_num_lanes(self, num_lanes: int) -> None:
        """Tell the host and the supervisor how many lanes are alive."""
        self.page.num_lanes = num_lanes
        self.page.publish()

    def _check_slowly(self, now: int, site: int) -> None:
        if self._is_running:
            self._end_quantum(now)
        self._site_of(site)
        state = self.reader.look()
        fits = state == "open" and now + self._needs_ns[site] + self._margin.value_ns < self.reader.until_ns
        if fits and self._is_running:
            self._tick(now)
        else:
            self._pause(now)
            self._resume(site)
        self._begin_quantum(site)

    def _tick(self, now: int) -> None:
        """Bookkeeping, while the device is ours."""
        if now - self._beat_ns >= _BEAT_NS:
            self._publish(RUNNING)
        for _ in range(min(_UPDATES_PER_TICK, len(self._stalest))):
            self._update(self._stalest[0])
            self._stalest.rotate(-1)

    def _end_quantum(self, now: int) -> None:
        """Learn from a quantum that is not plain: the first of a run, a long one, a late one, or the last."""
        preempted_ns = self._preempted_ns()
        quantum_ns = now - self._last_ns
        # The host takes the core when it wakes early; how long it keeps it says nothing about the quantum.
        lost_ns = max(0, min(quantum_ns, preempted_ns - self._last_preempted_ns))
        self._last_preempted_ns = preempted_ns
        self._lost_ns += lost_ns
        own_ns = quantum_ns - lost_ns
        estimate, need_ns = self._sites[self._site], self._need_ns
        if now - lost_ns > self._deadline_ns:
            self.overruns += 1
            self._overran = True
            if own_ns <= CLIP_FACTOR * need_ns:
                self._margin.overrun()
        else:
            estimate.confirm()
        if own_ns > need_ns:
            estimate.add_outlier(own_ns)
            self._update(self._site)
        elif not (self._is_first and estimate.is_settled):
            # The first quantum finds the host's data in the caches. It never meets a deadline, so it may be slow.
            estimate.add(own_ns)
        self._is_first = False

    def _begin_quantum(self, site: int) -> None:
        """Take over the reader's lease and start the quantum's time."""
        self._site, self._need_ns, self._add_sample = site, self._needs_ns[site], self._sites[site].add
        self._open_word = self.reader.open_word
        self._deadline_ns = self.reader.until_ns
        self._last_ns = now = self._now_ns()
        self._until_ns = 0 if self._is_first else min(self._deadline_ns - self._margin.value_ns, now + TICK_NS)

    def _pause(self, now: int) -> None:
        """Acknowledge. Idempotent."""
        self._until_ns = 0
        if self._is_running:
            self._is_running = False
            end_ns = max(self._start_ns, now - self._lost_ns)
            self._compute_ns += end_ns - self._start_ns
            if self.runs is not None:
                self.runs.append(Run(self._start_ns, end_ns, self.num_quanta - self._start_quanta))
            if not self._overran:
                self._margin.clean()
        self._publish_state(PAUSED)

    def _resume(self, site: Optional[int]) -> None:
        """Sleep until the gate is open for the quanta of `site` (or, without one, for anything), and start a run."""
        is_polled = self.poll is None
        while True:
            self._wait(site)
            if is_polled:
                break
            is_polled = True
            assert self.poll is not None
            self.poll()
            if self._now_ns() + self._need_of(site) < self.reader.until_ns:
                break
            self._refused_word = self._words[WORD_INDEX]  # what is left of a lease says nothing about whole ones
        self._start_ns, self._start_quanta = self._now_ns(), self.num_quanta
        self._is_running = self._is_first = True
        self._overran = False
        self._lost_ns = 0
        self._last_preempted_ns = self._preempted_ns()
        self._publish_state(RUNNING)

    def _wait(self, site: Optional[int]) -> None:
        used_word = self._open_word
        while True:
            word = self._words[WORD_INDEX]
            state = self.reader.look()
            if state == "gone":
                self._publish(LEAVING)
                raise GateGoneError(self.reader.gone_reason)
            lease_ns = self.reader.until_ns - self._now_ns()
            if state == "open" and self._need_of(site) < lease_ns:
                return
            if state == "open" and site is not None and word not in (used_word, self._refused_word):
                self._refused_word = word
                if self._sites[site].refuse(lease_ns, self._margin.value_ns):
                    self._needs_ns[site] = self._sites[site].p99_ns
                    continue
            if not self.reader.sleep(word, SLICE_S, WAKE_OPEN | WAKE_GONE):
                self._publish(PAUSED)

    def _need_of(self, site: Optional[int]) -> int:
        return self._margin.value_ns + (0 if site is None else self._needs_ns[site])

    def _site_of(self, site: int) -> SiteEstimate:
        estimate = self._sites.get(site)
        if estimate is None:
            estimate = self._sites[site] = SiteEstimate()
            self._needs_ns[site] = estimate.p99_ns + SLACK_NS
            self._stalest.append(site)
        return estimate

    def _update(self, site: int) -> None:
        self._needs_ns[site] = self._sites[site].update() + SLACK_NS

    def _publish_state(self, state: int) -> None:
        """At every pause and resume: nothing but what the supervisor must know at once."""
        self.page.state, self.page.acknowledged_word = state, self._words[WORD_INDEX]
        self.page.publish_state()

    def _publish(self, state: int) -> None:
        page = self.page
        page.state, page.acknowledged_word = state, self._words[WORD_INDEX]
        page.quantum_p99_ns = self.quantum_p99_ns
        page.overruns, page.num_quanta, page.compute_ns = self.overruns, self.num_quanta, self.compute_ns
        page.publish()
        self._beat_ns = self._now_ns()
