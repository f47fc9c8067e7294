"""The reporter on a clock that only the test moves: when the gate is open, and what happens when it fails."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from hydro_slurm.clock import ManualClock
from hydro_slurm.hooks.guard import Guard, is_control
from hydro_slurm.hooks.reporter import OPEN_LEASE_NS, BubbleReporter, Iteration
from hydro_slurm.timeline import TimelineWriter, read_timeline

MS = 1_000_000


class Host:
    """A host rank with a gap of 20 ms after its first slot, and one of 1 ms after its second."""

    def __init__(self, publisher, **settings) -> None:  # type: ignore[no-untyped-def]
        self.clock = ManualClock()
        self.publisher = publisher
        self.iterations: list[Iteration] = []
        self.states: list[str] = []
        settings.setdefault("control_share", 0.0)
        self.reporter = BubbleReporter(
            publisher, clock=self.clock, on_iteration=self.iterations.append, stage=1, **settings
        )
        self.reporter.set_schedule("1f1b")

    def pass_ms(self, duration_ms: float) -> None:
        self.clock.advance(duration_ms / 1000)

    def compute(self, kind: str, duration_ms: float) -> None:
        self.reporter.compute_begin(kind, 1, 0)
        if not self.publisher.error and self.reporter.mode != "open":
            assert self.publisher.state != "open", "the host computes while its gate is open"
        self.pass_ms(duration_ms)
        self.reporter.compute_end()

    def iterate(self, num: int = 1, *, gap_ms: float = 20) -> None:
        for _ in range(num):
            self.compute("forward", 10)
            self.states.append(self.publisher.state)
            self.pass_ms(gap_ms)
            self.compute("backward", 20)
            self.pass_ms(1)
            self.reporter.compute_begin("step")
            self.pass_ms(2)
            self.reporter.step_end()

    @property
    def gap_lease_ns(self) -> int:
        """How long the lease of a gap that began now would be."""
        return self.publisher.leases[-1][1] - self.clock.monotonic_ns()


def test_it_learns_first_and_then_opens_for_the_learned_time(publisher) -> None:  # type: ignore[no-untyped-def]
    host = Host(publisher)
    host.iterate(5)
    assert set(host.states) == {"closed"}
    host.iterate(5)
    assert host.states[-1] == "open"
    host.compute("forward", 10)
    assert host.publisher.state == "open"
    assert host.gap_lease_ns == 20 * MS
    assert publisher.leases[-1][0] == host.reporter.iteration


def test_short_gaps_never_open(publisher) -> None:  # type: ignore[no-untyped-def]
    host = Host(publisher)
    host.iterate(30, gap_ms=2)
    assert publisher.leases == []


def test_the_gap_across_the_iterations_end_is_predicted_too(publisher) -> None:  # type: ignore[no-untyped-def]
    host = Host(publisher)
    for _ in range(12):
        host.iterate(gap_ms=1)
        state = publisher.state
        host.pass_ms(30)
    assert state == "open"
    host.iterate(gap_ms=1)
    assert host.gap_lease_ns == 30 * MS


def test_iterations_are_handed_on_with_their_gaps(publisher) -> None:  # type: ignore[no-untyped-def]
    host = Host(publisher)
    host.iterate(12)
    last = host.iterations[-1]
    assert (last.dur_ns, last.mode, last.control, last.iteration) == (53 * MS, "bubbles", False, 11)
    assert [(gap.position, gap.dur_ns, gap.predicted_ns) for gap in last.gaps] == [(1, 20 * MS, 20 * MS)]
    assert host.reporter.iteration_ns == 53 * MS


def test_control_iterations_stay_closed_as_drawn(publisher) -> None:  # type: ignore[no-untyped-def]
    host = Host(publisher, control_share=0.3, secret=b"shared by all ranks")
    host.iterate(60)
    drawn = [is_control(b"shared by all ranks", step, 0.3) for step in range(60)]
    assert any(drawn[8:])
    assert [state == "closed" for state in host.states[8:]] == drawn[8:]
    assert [one.control for one in host.iterations[8:]] == drawn[9:]


def test_modes_closed_and_open(publisher) -> None:  # type: ignore[no-untyped-def]
    host = Host(publisher)
    host.iterate(10)
    host.reporter.set_mode("closed")
    num_leases = len(publisher.leases)
    host.iterate(10)
    assert len(publisher.leases) == num_leases
    host.reporter.set_mode("open")
    assert publisher.state == "open"
    for _ in range(40):
        host.iterate(gap_ms=900)
        assert publisher.state == "open"
        assert host.gap_lease_ns >= OPEN_LEASE_NS // 3
    host.reporter.set_mode("bubbles")
    host.iterate(2)
    assert host.states[-1] == "open"
    host.compute("forward", 10)
    assert host.gap_lease_ns == 20 * MS, "gaps of the open mode were learned"


def test_an_unknown_mode_disables_sharing_and_nothing_else(publisher) -> None:  # type: ignore[no-untyped-def]
    host = Host(publisher)
    host.reporter.set_mode("ajar")
    assert host.reporter.disabled
    host.iterate(2)
    assert publisher.state == "gone"


def test_evaluation_is_closed_not_learned_and_not_measured(publisher) -> None:  # type: ignore[no-untyped-def]
    host = Host(publisher)
    host.iterate(10)
    num_measured = len(host.iterations)
    host.compute("forward", 10)
    assert publisher.state == "open"
    host.reporter.suspend()
    assert publisher.state == "closed"
    assert publisher.num_epochs == 1
    host.compute("forward", 50)
    assert publisher.state == "closed", "an evaluation's forward passes open nothing"
    host.pass_ms(5000)
    host.reporter.resume()
    host.iterate()
    assert len(host.iterations) == num_measured
    host.iterate(5)
    assert host.iterations[-1].dur_ns == 53 * MS
    assert host.states[-1] == "open"
    host.compute("forward", 10)
    assert host.gap_lease_ns == 20 * MS


def test_after_a_meeting_of_all_ranks_the_first_gap_and_iteration_count(publisher) -> None:  # type: ignore[no-untyped-def]
    host = Host(publisher)
    for _ in range(10):
        host.iterate(gap_ms=1)
        host.pass_ms(30)
    host.reporter.suspend()
    host.pass_ms(700)
    num_measured = len(host.iterations)
    host.reporter.resume(aligned=True)
    assert publisher.state == "open"
    host.pass_ms(30)
    host.iterate(gap_ms=1)
    assert len(host.iterations) == num_measured + 1
    assert host.iterations[-1].dur_ns == 64 * MS
    assert [gap.position for gap in host.iterations[-1].gaps] == [0]


def test_another_schedule_voids_the_epoch_and_is_learned_anew(publisher) -> None:  # type: ignore[no-untyped-def]
    host = Host(publisher)
    host.iterate(10)
    host.reporter.set_schedule("1f1b")
    assert publisher.num_epochs == 0
    host.reporter.set_schedule("1f1b with 8 microbatches")
    assert publisher.num_epochs == 1
    assert host.reporter.learning
    num_leases = len(publisher.leases)
    host.iterate(5)
    assert len(publisher.leases) == num_leases
    host.iterate(5)
    assert host.states[-1] == "open"


def test_a_shut_guard_keeps_the_gate_closed(publisher) -> None:  # type: ignore[no-untyped-def]
    guard = Guard()
    host = Host(publisher, guard=guard)
    host.iterate(10)
    assert host.states[-1] == "open"
    guard.shut = True
    host.iterate(3)
    assert host.states[-3:] == ["closed"] * 3


def test_learning_is_announced_once(publisher) -> None:  # type: ignore[no-untyped-def]
    announced: list[bool] = []
    host = Host(publisher, on_learned=lambda: announced.append(True))
    host.iterate(3)
    assert announced == []
    host.iterate(20)
    assert announced == [True]


def test_a_gate_that_fails_ends_sharing_with_one_line_and_training_goes_on(
    publisher, caplog: pytest.LogCaptureFixture
) -> None:  # type: ignore[no-untyped-def]
    host = Host(publisher)
    host.iterate(10)
    publisher.error = OSError("No space left on device")
    with caplog.at_level(logging.WARNING):
        host.iterate(10)
    assert [record.getMessage() for record in caplog.records] == [
        "bubble sharing is off from now on, training goes on: OSError: No space left on device"
    ]
    assert host.reporter.disabled
    assert publisher.state == "gone"


def test_a_listener_that_fails_ends_sharing_and_nothing_else(publisher) -> None:  # type: ignore[no-untyped-def]
    def fail(iteration: Iteration) -> None:
        raise RuntimeError("disk full")

    host = Host(publisher)
    host.reporter.on_iteration = fail
    host.iterate(3)
    assert host.reporter.disabled


def test_the_timeline_holds_compute_gaps_and_leases(publisher, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    timeline = TimelineWriter(tmp_path / "t.jsonl", "n1", 7, 0)
    host = Host(publisher, timeline=timeline)
    host.iterate(10)
    host.reporter.set_mode("closed")
    host.iterate(1)
    timeline.flush()
    _, events = read_timeline(tmp_path / "t.jsonl")
    of_last_shared = [(event.kind, event.dur_ns // MS) for event in events if event.iteration == 9]
    assert of_last_shared == [
        ("forward", 10),
        ("open", 20),
        ("close", 0),
        ("gap", 20),
        ("backward", 20),
        ("step", 2),
        ("iteration", 53),
    ]
    assert [event.mode for event in events if event.kind == "iteration"] == ["bubbles"] * 9 + ["closed"]
    assert {event.stage for event in events} == {1}
