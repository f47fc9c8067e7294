"""How a bundle holds to its gate, on a clock that only the test moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydro_slurm.errors import GateGoneError
from hydro_slurm.gate.bundle_page import BundlePage, BundleSnapshot
from hydro_slurm.gate.free import ComputeGate, FreeGate
from hydro_slurm.gate.layout import LEAVING, PAUSED, RUNNING, UNDIVIDED
from hydro_slurm.gate.quanta import QuantumGate
from hydro_slurm.gate.reader import GateReader
from hydro_slurm.gate.writer import GateWriter

MS = 1_000_000


class Clock(Protocol):
    """The scripted clock of conftest.py."""

    def monotonic_ns(self) -> int: ...
    def wall_s(self) -> float: ...
    def sleep(self, seconds: float) -> None: ...
    def advance(self, seconds: float) -> None: ...
    def at(self, monotonic_ns: int, action: Callable[[], None]) -> None: ...


class Bench:
    """A host with a script, and a bundle whose quanta move the clock."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        self.clock = clock
        self.writer = GateWriter.create(directory, stage=0, num_stages=2, clock=clock)
        self.reader = GateReader.attach(directory, clock=clock)
        self.page = BundlePage.create(directory, "b1", clock=clock)
        self._seen = BundlePage.attach(directory, "b1")
        self.preempted_ns = 0
        self.leases: list[tuple[int, int]] = []
        self.end_ns = clock.monotonic_ns()
        self.next_ns = clock.monotonic_ns() + MS

    def gate(self, **options: object) -> QuantumGate:
        return QuantumGate(
            self.reader,
            self.page,
            clock=self.clock,
            preempted_ns=lambda: self.preempted_ns,
            **options,  # type: ignore[arg-type]
        )

    def plan(self, num_leases: int, lease_ms: float, pause_ms: float = 30.0, *, closes_after_ms: float = -1) -> None:
        """Leases from now on; each is closed at its deadline or earlier."""
        begin_ns = max(self.next_ns, self.clock.monotonic_ns() + MS)
        for _ in range(num_leases):
            deadline_ns = begin_ns + int(lease_ms * MS)
            close_ns = deadline_ns if closes_after_ms < 0 else begin_ns + int(closes_after_ms * MS)
            self.clock.at(begin_ns, lambda deadline_ns=deadline_ns: self.writer.open(deadline_ns))  # type: ignore[misc]
            self.clock.at(close_ns, self.writer.close)
            self.leases.append((begin_ns, close_ns))
            begin_ns = deadline_ns + int(pause_ms * MS)
            self.end_ns = close_ns
        self.next_ns = begin_ns
        self.clock.at(begin_ns, self.writer.heartbeat)

    def compute(self, ms: float) -> None:
        self.clock.advance(ms / 1e3)

    def said(self) -> BundleSnapshot:
        found = self._seen.snapshot()
        assert found is not None
        return found

    def last_deadline_ns(self) -> int:
        """Of the lease that the clock stands in or behind."""
        return max(end for begin, end in self.leases if begin <= self.clock.monotonic_ns())

    def work(self, gate: QuantumGate, durations_ms: Callable[[int], float]) -> list[tuple[int, int]]:
        """Quanta until the plan is over; (begin, end) of each."""
        over_ns = self.next_ns
        self.clock.at(over_ns, lambda: self.writer.open(over_ns + 60_000 * MS))
        done = []
        while True:
            gate.check()
            begin_ns = self.clock.monotonic_ns()
            if begin_ns >= over_ns:
                gate.wait_until_open()
                self.writer.close()
                return done
            self.compute(durations_ms(len(done)))
            done.append((begin_ns, self.clock.monotonic_ns()))

    def used(self, done: list[tuple[int, int]], num_leases: int) -> float:
        """Share of the last leases' time that was computed in."""
        return sum(end - begin for begin, end in done) / sum(end - begin for begin, end in self.leases[-num_leases:])

    def num_late(self, done: list[tuple[int, int]]) -> int:
        return sum(not any(a <= begin and end <= b for a, b in self.leases) for begin, end in done)


@pytest.fixture
def bench(gate_directory: Path, scripted_clock: Clock) -> Bench:
    return Bench(gate_directory, scripted_clock)


@pytest.mark.parametrize(
    ("lease_ms", "quantum_ms", "least_used"), [(20, 0.2, 0.95), (20, 1, 0.9), (20, 3, 0.75), (150, 3, 0.95)]
)
def test_uses_bubbles_and_never_overruns(bench: Bench, lease_ms: float, quantum_ms: float, least_used: float) -> None:
    gate = bench.gate()
    bench.plan(60, lease_ms)
    done = bench.work(gate, lambda _: quantum_ms)
    assert bench.num_late(done) == 0
    assert gate.overruns == 0
    assert bench.used(done, 60) >= least_used


def test_pauses_and_acknowledges_when_the_host_closes_early(bench: Bench) -> None:
    gate = bench.gate()
    bench.plan(1, 50, closes_after_ms=20)
    bench.plan(1, 50)
    gate.check()
    assert bench.said().state == RUNNING
    word = bench.writer.word
    assert bench.said().acknowledged_word == word
    states = []
    bench.clock.at(bench.leases[0][1] + 5 * MS, lambda: states.append(bench.said()))
    while bench.clock.monotonic_ns() < bench.leases[0][1]:
        bench.compute(0.9)
        gate.check()
    assert bench.clock.monotonic_ns() == bench.leases[1][0], "the check slept until the next lease"
    assert [state.state for state in states] == [PAUSED]
    assert states[0].acknowledged_word == word - 1, "the same epoch, closed"
    assert bench.said().state == RUNNING


def test_pause_is_heard_while_it_lasts(bench: Bench) -> None:
    """The bundle's heartbeat goes on in a long pause."""
    gate = bench.gate()
    ages_ns = []
    bench.plan(1, 20)
    bench.next_ns += 3_000 * MS
    bench.plan(1, 20)
    for second in (1, 2):
        when_ns = bench.leases[1][0] - second * 1_000 * MS
        bench.clock.at(when_ns, lambda: ages_ns.append(bench.clock.monotonic_ns() - bench.said().heartbeat_ns))
    gate.check()
    while bench.clock.monotonic_ns() < bench.leases[1][0]:
        bench.compute(1.0)
        gate.check()
    assert len(ages_ns) == 2
    assert max(ages_ns) <= 300 * MS


def test_host_that_leaves_ends_the_bundle(bench: Bench) -> None:
    gate = bench.gate()
    bench.plan(1, 20)
    gate.check()
    bench.writer.leave()
    with pytest.raises(GateGoneError, match=r"left|deleted"):
        gate.check()
    assert bench.said().state == LEAVING
    with pytest.raises(GateGoneError):
        gate.wait_until_open()


def test_overruns_are_counted_and_widen_the_margin(bench: Bench) -> None:
    gate = bench.gate()
    bench.plan(40, 20)
    bench.work(gate, lambda _: 1.0)
    before = gate._margin.value_ns
    bench.plan(40, 20)
    # Every quantum that begins late in a lease takes twice as long: no estimate from the others foresees that.
    bench.work(gate, lambda _: 2.9 if bench.last_deadline_ns() - bench.clock.monotonic_ns() < 2.5 * MS else 1.0)
    assert gate.overruns > 0
    assert bench.said().overruns > 0
    assert gate._margin.value_ns > before
    widened = gate._margin.value_ns
    bench.plan(400, 20)
    overruns = gate.overruns
    bench.work(gate, lambda _: 1.0)
    assert gate.overruns == overruns
    assert gate._margin.value_ns < widened, "and shrinks again while all goes well"


def test_being_preempted_by_the_host_teaches_nothing(bench: Bench) -> None:
    """The host comes early and takes the core for 12 ms: the quantum measures 13 ms and took 1 ms."""
    gate = bench.gate()
    bench.plan(60, 30)

    def quantum_ms(number: int) -> float:
        if number % 20 == 19:
            bench.preempted_ns += 12 * MS
            return 13.0
        return 1.0

    bench.work(gate, quantum_ms)
    assert gate.quantum_p99_ns <= 1.1 * MS
    assert gate.overruns == 0


def test_time_under_preemption_is_not_compute(bench: Bench) -> None:
    gate = bench.gate(record_runs=True)
    bench.plan(2, 20)
    gate.check()
    for _ in range(10):
        bench.compute(1.0)
        gate.check()
    bench.preempted_ns += 8 * MS
    bench.compute(9.0)
    gate.check()
    assert gate.runs is not None
    assert len(gate.runs) == 1
    assert gate.compute_ns == gate.runs[0].end_ns - gate.runs[0].start_ns == 11 * MS
    assert gate.runs[0].num_quanta == 11


def test_one_stop_by_signal_is_forgotten_soon(bench: Bench) -> None:
    """A quantum that was stopped for half a second is one of many, and counts for little."""
    gate = bench.gate()
    bench.plan(40, 20)
    bench.work(gate, lambda _: 1.0)
    bench.plan(1, 20)
    gate.check()
    bench.compute(500.0)
    overruns = gate.overruns
    bench.plan(60, 20)
    done = bench.work(gate, lambda _: 1.0)
    assert gate.overruns == overruns + 1
    assert gate.quantum_p99_ns <= 1.1 * MS
    assert bench.used(done, 60) > 0.85


def test_estimates_that_no_lease_fits_are_tried_again(bench: Bench) -> None:
    """The first quanta were slow (loading, compiling): without a second try the bundle would wait for ever."""
    gate = bench.gate()
    bench.plan(1, 400)
    gate.check()
    for _ in range(5):
        bench.compute(50.0)
        gate.check()
    bench.clock.advance(1)
    bench.plan(100, 20)
    done = bench.work(gate, lambda _: 1.0)
    assert bench.used(done, 100) > 0.75


def test_quanta_that_really_do_not_fit_are_tried_ever_more_rarely(bench: Bench) -> None:
    gate = bench.gate()
    bench.plan(300, 20)
    done = bench.work(gate, lambda _: 50.0)
    assert 1 <= len(done) <= 20
    assert gate.overruns >= len(done) - 1


def test_sites_are_estimated_apart(bench: Bench) -> None:
    """One long operation (from site 1) does not make the many short ones careful."""
    gate = bench.gate()
    bench.plan(150, 20)
    late = num_long = 0
    spent_ms = 0.0
    while bench.clock.monotonic_ns() < bench.leases[-1][0]:
        for site, ms in [(0, 0.5)] * 30 + [(1, 6.0)]:
            gate.check(site)
            bench.compute(ms)
            spent_ms += ms
            num_long += site
            late += bench.clock.monotonic_ns() > bench.last_deadline_ns()
    assert num_long > 50
    assert late <= 2, "the long one is learned after the first"
    lease_ms = sum(end - begin for begin, end in bench.leases) / MS
    assert spent_ms / lease_ms > 0.8
    assert gate._needs_ns[0] < MS
    assert gate._needs_ns[1] >= 6 * MS
    assert bench.said().quantum_p99_ns >= 6 * MS


def test_code_that_is_no_quantum_teaches_nothing(bench: Bench) -> None:
    gate = bench.gate()
    bench.plan(30, 20)
    bench.work(gate, lambda _: 1.0)
    need_ns = gate.quantum_p99_ns
    bench.plan(4, 50)
    for _ in range(3):
        gate.wait_until_open()
        assert bench.said().state == RUNNING
        bench.compute(40.0)
    gate.wait_until_open()
    gate.check()
    assert gate.quantum_p99_ns == need_ns


def test_resting_in_an_open_gate(bench: Bench) -> None:
    """A bundle that waits for something else says so, and goes on at its next check without having learned from it."""
    gate = bench.gate(record_runs=True)
    bench.plan(1, 20)
    for _ in range(3):
        gate.check()
        bench.compute(0.5)
    gate.pause()
    assert bench.said().state == PAUSED
    bench.compute(0.1)
    gate.check()
    assert bench.said().state == RUNNING
    bench.compute(0.5)
    gate.begin_leaving()
    assert bench.said().state == LEAVING
    assert gate.compute_ns == 2 * MS
    assert gate.runs is not None
    assert [run.num_quanta for run in gate.runs] == [2, 0]


def test_undivided_work_says_so(bench: Bench) -> None:
    gate = bench.gate()
    bench.plan(3, 20)
    with gate.undivided():
        assert bench.said().state == UNDIVIDED
        bench.compute(1.0)
    assert bench.said().state == RUNNING
    with pytest.raises(ZeroDivisionError), gate.undivided():
        raise ZeroDivisionError
    assert bench.said().state == RUNNING


def test_poll_is_called_once_after_each_resume(bench: Bench) -> None:
    polls: list[int] = []
    gate = bench.gate(poll=lambda: polls.append(bench.clock.monotonic_ns()))
    bench.plan(5, 20)
    bench.work(gate, lambda _: 1.0)
    assert polls == [*(begin for begin, _ in bench.leases), bench.clock.monotonic_ns()], "the last one ends the plan"


def test_poll_that_uses_up_the_lease_is_followed_by_a_pause(bench: Bench) -> None:
    gate = bench.gate(poll=lambda: bench.compute(19.0))
    bench.plan(2, 20)
    gate.check()
    assert bench.clock.monotonic_ns() >= bench.leases[1][0]
    assert bench.clock.monotonic_ns() < bench.leases[1][0] + MS, "polled once, not twice"


def test_runs_and_counts(bench: Bench) -> None:
    gate = bench.gate(record_runs=True)
    gate.set_num_lanes(7)
    bench.plan(3, 20)
    done = bench.work(gate, lambda _: 1.0)
    bench.writer.leave()
    with pytest.raises(GateGoneError):
        gate.check()
    assert gate.runs is not None
    assert [(run.start_ns, run.num_quanta) for run in gate.runs[:3]] == [(begin, 19) for begin, _ in bench.leases]
    assert all(run.end_ns <= end for run, (_, end) in zip(gate.runs, bench.leases, strict=False))
    assert gate.compute_ns == sum(run.end_ns - run.start_ns for run in gate.runs)
    assert gate.num_quanta >= len(done)
    said = bench.said()
    assert (said.num_lanes, said.num_quanta, said.compute_ns) == (7, gate.num_quanta, gate.compute_ns)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_quantum_begins_that_is_expected_to_end_late(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, scripted_clock: Clock
) -> None:
    """Whatever leases and quanta: after each check there is time for the estimate and the margin."""
    bench = Bench(tmp_path_factory.mktemp("gate") / "gate", type(scripted_clock)())
    gate = bench.gate()
    for lease_ms, pause_ms in data.draw(
        st.lists(st.tuples(st.floats(4, 60), st.floats(0.1, 40)), min_size=1, max_size=8)
    ):
        bench.plan(1, lease_ms, pause_ms, closes_after_ms=data.draw(st.floats(1, lease_ms)))
    bench.clock.at(bench.next_ns + 100 * MS, bench.writer.leave)
    with pytest.raises(GateGoneError):
        while True:
            site = data.draw(st.integers(0, 2))
            gate.check(site)
            now = bench.clock.monotonic_ns()
            assert any(begin <= now < end for begin, end in bench.leases)
            assert now + gate._needs_ns[site] + gate._margin.value_ns <= bench.reader.until_ns
            bench.compute(data.draw(st.floats(0.05, 9)))
    assert bench.said().state == LEAVING


def test_free_gate_measures_and_never_waits(scripted_clock: Clock) -> None:
    polls = []
    gate: ComputeGate = FreeGate(poll=lambda: polls.append(1), record_runs=True, clock=scripted_clock)
    for _ in range(200):
        gate.check()
        scripted_clock.advance(0.001)
    gate.wait_until_open()
    with gate.undivided():
        scripted_clock.advance(0.1)
    gate.check()
    gate.set_num_lanes(3)
    assert gate.quantum_p99_ns == MS
    assert gate.compute_ns == 300 * MS
    assert gate.num_quanta == 201
    assert gate.overruns == 0
    assert 2 <= len(polls) <= 6
    assert gate.runs is not None
    assert len(gate.runs) == 1
