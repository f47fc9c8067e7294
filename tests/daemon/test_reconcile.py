"""The loop does what policy says, and nothing while Slurm is away."""

from __future__ import annotations

from hydro_slurm.clock import ManualClock
from hydro_slurm.daemon import Reconciler, World
from hydro_slurm.errors import SlurmUnavailableError
from hydro_slurm.policy import Demand, Finish, Launch, Refill, RunningBundle, SizingPolicy, Slot

DEMAND = Demand(purpose="search", num_waiting=3, sizing=SizingPolicy(max_lanes=4))


class RecordingBackend:
    def __init__(self, world: World) -> None:
        self.world = world
        self.actions: list[Launch | Refill | Finish] = []
        self.failure: Exception | None = None

    def read(self) -> World:
        return self.world

    def launch(self, launch: Launch) -> None:
        if self.failure:
            raise self.failure
        self.actions.append(launch)

    def refill(self, refill: Refill) -> None:
        self.actions.append(refill)

    def finish(self, finish: Finish) -> None:
        self.actions.append(finish)


def test_a_cycle_carries_the_plan_out_and_says_so() -> None:
    backend = RecordingBackend(World((DEMAND,), (Slot(id="a"),), ()))
    sentence = Reconciler(backend, clock=ManualClock()).run_cycle()
    assert backend.actions == [Launch("a", "search", 3)]
    assert sentence == "launched=1 refilled=0 finished=0 bundles: waiting=3 slots=1 bundles=0 lanes=0"


def test_nothing_to_do_is_said_too() -> None:
    bundle = RunningBundle(id="b", slot_id="a", purpose="search", num_lanes=4, max_lanes=4)
    backend = RecordingBackend(World((DEMAND,), (Slot(id="a"),), (bundle,)))
    assert Reconciler(backend, clock=ManualClock()).run_cycle() == (
        "nothing to do: waiting=3 slots=1 bundles=1 lanes=4"
    )
    assert backend.actions == []


def test_it_backs_off_while_slurm_is_away_and_recovers() -> None:
    clock = ManualClock()
    backend = RecordingBackend(World((DEMAND,), (Slot(id="a"),), ()))
    backend.failure = SlurmUnavailableError("connection refused")
    loop = Reconciler(backend, interval_s=1.0, clock=clock)
    pauses = []
    for _ in range(8):
        assert "connection refused" in loop.run_cycle()
        pauses.append(loop.pause_s())
    assert pauses == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    assert backend.actions == []
    backend.failure = None
    assert loop.run_cycle().startswith("launched=1")
    assert loop.pause_s() == 1.0


def test_run_ends_when_told() -> None:
    backend = RecordingBackend(World((), (), ()))
    clock = ManualClock()
    started_s = clock.wall_s()
    end_s = started_s + 12.0
    Reconciler(backend, interval_s=5.0, clock=clock).run(lambda: clock.wall_s() >= end_s, lambda: None)
    assert clock.wall_s() == end_s


def test_a_long_back_off_is_left_at_once_when_told() -> None:
    clock = ManualClock()
    backend = RecordingBackend(World((DEMAND,), (Slot(id="a"),), ()))
    backend.failure = SlurmUnavailableError("connection refused")
    loop = Reconciler(backend, interval_s=1.0, clock=clock)
    for _ in range(8):
        loop.run_cycle()
    assert loop.pause_s() == 60.0
    end_s = clock.wall_s() + 2.0
    loop.run(lambda: clock.wall_s() >= end_s, lambda: None)
    assert clock.wall_s() == end_s


def test_a_clock_that_is_set_back_stops_no_decision() -> None:
    """Wall clocks jump; deciding goes by the other one."""
    clock = ManualClock()
    backend = RecordingBackend(World((DEMAND,), (Slot(id="a"),), ()))
    loop = Reconciler(backend, interval_s=1.0, clock=clock)
    assert loop.run_cycle().startswith("launched=1")
    clock._wall_s -= 3600.0
    clock._monotonic_ns += 1_000_000_000
    assert loop.run_cycle().startswith("launched=1")
