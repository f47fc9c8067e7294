"""The base load: devices are conserved and never shared, orders are kept, queues behave as theory says."""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydro_sim.engine import Engine
from hydro_sim.nodes import NodePool
from hydro_sim.queueing import Jobs, SchedulerConfig
from hydro_slurm.errors import SimulationError

job_lists = st.lists(
    st.tuples(st.integers(0, 200), st.integers(1, 60), st.integers(1, 24), st.integers(0, 60)), max_size=40
)


def make_engine(rows: list[tuple[float, float, int, float]], policy: str, num_nodes: int, per_node: int) -> Engine:
    rows = sorted(rows)
    columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]
    submit, duration, devices, slack = columns
    limits = [run + more for run, more in zip(duration, slack, strict=True)]
    jobs = Jobs([float(s) for s in submit], [float(d) for d in duration], [float(x) for x in limits], devices)
    pools = [NodePool(num_nodes, per_node)]
    return Engine(jobs, [0] * len(rows), pools, SchedulerConfig(policy=policy))


@settings(max_examples=120, deadline=None)
@given(rows=job_lists, policy=st.sampled_from(["fifo", "backfill", "priority"]))
def test_devices_are_conserved_and_never_shared(rows: list[tuple[float, float, int, float]], policy: str) -> None:
    engine = make_engine(rows, policy, 3, 8)
    held: dict[int, list[tuple[float, float, int]]] = defaultdict(list)
    jobs = engine.jobs

    def note(job: int) -> None:
        allocation = engine.partitions[0].allocations[job]
        parts = ((allocation, jobs.devices[job]),) if isinstance(allocation, int) else allocation
        assert sum(count for _, count in parts) == jobs.devices[job]
        for node, count in parts:
            held[node].append((jobs.start_s[job], jobs.end_s[job], count))

    engine.on_end = dict.fromkeys(range(len(jobs)), note)
    engine.run()
    assert all(start >= submit for start, submit in zip(jobs.start_s, jobs.submit_s, strict=True)), "all have run"
    assert all(end == start + run for start, end, run in zip(jobs.start_s, jobs.end_s, jobs.duration_s, strict=True))
    for intervals in held.values():
        moments = sorted([(begin, 1, n) for begin, _, n in intervals] + [(end, 0, -n) for _, end, n in intervals])
        level = 0
        for _, _, change in moments:
            level += change
            assert level <= 8, "no device holds two jobs"
    work = sum(run * n for run, n in zip(jobs.duration_s, jobs.devices, strict=True))
    assert engine.partitions[0].busy_device_s == pytest.approx(work), "device-seconds are conserved"
    assert engine.partitions[0].pool.num_free == 24


@settings(max_examples=60, deadline=None)
@given(rows=job_lists)
def test_fifo_starts_jobs_in_the_order_of_submission(rows: list[tuple[float, float, int, float]]) -> None:
    engine = make_engine(rows, "fifo", 3, 8)
    engine.run()
    assert engine.jobs.start_s == sorted(engine.jobs.start_s)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 60), st.integers(1, 8), st.just(0)), max_size=30))
def test_backfill_never_delays_the_first_job_of_the_queue(rows: list[tuple[float, float, int, float]]) -> None:
    """On one node with limits that are exact, the job at the head starts no later than strict order would let it."""
    filled, strict = make_engine(rows, "backfill", 1, 8), make_engine(rows, "fifo", 1, 8)
    filled.run()
    strict.run()
    waiting = [i for i in range(len(rows)) if strict.jobs.start_s[i] > strict.jobs.submit_s[i]]
    for job in waiting[:1]:
        assert filled.jobs.start_s[job] <= strict.jobs.start_s[job]


def test_backfill_fills_a_hole_that_fifo_leaves() -> None:
    rows = [(0.0, 100.0, 6, 0.0), (1.0, 50.0, 8, 0.0), (2.0, 10.0, 2, 0.0), (3.0, 500.0, 2, 0.0)]
    fifo, backfill = make_engine(rows, "fifo", 1, 8), make_engine(rows, "backfill", 1, 8)
    fifo.run()
    backfill.run()
    assert fifo.jobs.start_s == [0.0, 100.0, 150.0, 150.0]
    assert backfill.jobs.start_s == [0.0, 100.0, 2.0, 150.0], "the short job goes ahead, the long one would delay"


def test_priority_lets_a_user_with_less_usage_go_first() -> None:
    engine = make_engine([(0.0, 10.0, 8, 0.0), (1.0, 10.0, 8, 0.0), (2.0, 10.0, 8, 0.0)], "priority", 1, 8)
    engine.jobs.priority_s[:] = [0.0, -60.0, 0.0]
    engine.run()
    assert engine.jobs.start_s == [0.0, 20.0, 10.0]


def test_large_jobs_get_whole_nodes_and_small_ones_the_fullest() -> None:
    pool = NodePool(3, 8)
    assert pool.take(3) == 0
    assert pool.take(16) == ((1, 8), (2, 8))
    assert pool.take(6) is None
    assert pool.take(5) == 0
    pool.give_back(((1, 8), (2, 8)), 16)
    assert pool.take(2) == 1
    assert pool.take(10) == ((2, 8), (1, 2)), "what is left over goes to the fullest node with room"
    assert pool.num_free == 24 - 3 - 5 - 2 - 10


def test_a_node_that_fails_gives_and_takes_nothing_until_it_is_repaired() -> None:
    pool = NodePool(2, 4)
    assert pool.take(2) == 0
    pool.fail(0)
    assert pool.num_free == 4
    pool.give_back(0, 2)
    assert pool.num_free == 4
    assert pool.take(4) == 1
    assert pool.take(1) is None
    pool.repair(0)
    assert pool.take(4) == 0


def erlang_c_wait(num_servers: int, load: float, service_s: float) -> float:
    """Mean wait of an M/M/c queue. Source: Erlang C."""
    offered = num_servers * load
    top = offered**num_servers / math.factorial(num_servers) / (1 - load)
    p_wait = top / (sum(offered**k / math.factorial(k) for k in range(num_servers)) + top)
    return p_wait * service_s / (num_servers * (1 - load))


@pytest.mark.parametrize(("num_servers", "load"), [(1, 0.5), (4, 0.7), (16, 0.9)])
def test_waits_of_an_mmc_queue_are_those_of_theory(num_servers: int, load: float) -> None:
    means = []
    for seed in range(12):
        draw = random.Random(seed)
        now_s, rows = 0.0, []
        for _ in range(6000):
            now_s += draw.expovariate(num_servers * load)
            rows.append((now_s, draw.expovariate(1.0), 1, 0.0))
        engine = make_engine(rows, "fifo", num_servers, 1)
        engine.run()
        waits = [start - s for start, s in zip(engine.jobs.start_s, engine.jobs.submit_s, strict=True)]
        means.append(statistics.fmean(waits[500:]))
    expected = erlang_c_wait(num_servers, load, 1.0)
    half_width = 3.1 * statistics.stdev(means) / math.sqrt(len(means))  # 99 % of Student's t with 11 degrees
    assert abs(statistics.fmean(means) - expected) < half_width + 1e-9


def test_the_pool_finds_the_same_nodes_as_a_plain_search() -> None:
    draw, pool, free = random.Random(0), NodePool(20, 8), [8] * 20
    running: list[tuple[int, int]] = []
    for _ in range(5000):
        if running and draw.random() < 0.5:
            node, count = running.pop(draw.randrange(len(running)))
            pool.give_back(node, count)
            free[node] += count
        else:
            count = draw.randint(1, 8)
            best = min(((n, i) for i, n in enumerate(free) if n >= count), default=None)
            got = pool.take(count)
            assert got == (None if best is None else best[1])
            if isinstance(got, int):
                free[got] -= count
                running.append((got, count))
    assert pool.free == free


def test_jobs_that_cannot_be_are_refused() -> None:
    with pytest.raises(SimulationError, match="asks for 25 devices, its partition has 24"):
        make_engine([(0.0, 1.0, 25, 0.0)], "fifo", 3, 8)
    engine = make_engine([], "fifo", 1, 1)
    engine.run()
    heapq.heappush(engine._heap, (5.0, 1, 0, lambda: None))
    engine.run()
    with pytest.raises(SimulationError, match=r"asked at 5\.0 s to be called at 4\.0 s"):
        engine.call_at(4.0, lambda: None)
