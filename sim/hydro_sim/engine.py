"""The event loop: arrivals from a sorted column, everything else from one heap. Deterministic; no ticks."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any

from hydro_sim.nodes import NodePool
from hydro_sim.queueing import Jobs, Partition, SchedulerConfig
from hydro_slurm.errors import SimulationError

JOB_END, CALL = 0, 1
"""Kinds of events; at the same moment jobs end first, then jobs arrive, then everything else happens."""


class Engine:
    """Runs jobs on partitions, and calls whoever has asked to be called.

    Args:
        jobs: All jobs that are known from the start, in the order of their submit times.
        partition_of: Index of each job's partition.
        pools: Nodes of each partition.
        config: How jobs are scheduled.

    Raises:
        SimulationError: Submit times fall, or a job asks for more devices than its partition has.
    """

    def __init__(
        self, jobs: Jobs, partition_of: list[int], pools: Sequence[NodePool], config: SchedulerConfig | None = None
    ) -> None:
        self.jobs, self.partition_of = jobs, partition_of
        self.now_s = 0.0
        self.num_events = 0
        self.partitions = [Partition(pool, jobs, config or SchedulerConfig(), self._started) for pool in pools]
        self.on_start: dict[int, Callable[[int], None]] = {}
        """By job: called when it starts."""
        self.on_end: dict[int, Callable[[int], None]] = {}
        """By job: called when it has ended, just before its devices are given to others."""
        self._heap: list[tuple[float, int, int, Any]] = []
        self._num_calls = 0
        self._next_arrival = 0
        self._num_arrivals = len(jobs)
        self._dirty: set[int] = set()
        for job in range(1, len(jobs)):
            if jobs.submit_s[job] < jobs.submit_s[job - 1]:
                raise SimulationError(f"job {job} is submitted before the job in front of it: sort by submit time")
        for job, partition in enumerate(partition_of):
            if jobs.devices[job] > pools[partition].num_devices:
                raise SimulationError(
                    f"job {job} asks for {jobs.devices[job]} devices, its partition has {pools[partition].num_devices}"
                )

    def call_at(self, time_s: float, function: Callable[[], None]) -> None:
        """Call a function at a moment, after all job ends and arrivals of that moment."""
        if time_s < self.now_s:
            raise SimulationError(f"asked at {self.now_s} s to be called at {time_s} s")
        self._num_calls += 1
        heapq.heappush(self._heap, (time_s, CALL, self._num_calls, function))

    def submit(self, duration_s: float, limit_s: float, devices: int, partition: int) -> int:
        """Submit a job now; `duration_s` may be infinite, then `finish` ends it. Returns its index."""
        if devices > self.partitions[partition].pool.num_devices:
            raise SimulationError(
                f"a job asks for {devices} devices, its partition has {self.partitions[partition].pool.num_devices}"
            )
        job = self.jobs.add(self.now_s, duration_s, limit_s, devices)
        self.partition_of.append(partition)
        self.partitions[partition].submit(job)
        self._dirty.add(partition)
        return job

    def finish(self, job: int) -> None:
        """End a running job now."""
        heapq.heappush(self._heap, (self.now_s, JOB_END, job, self.jobs.start_s[job]))
        self.jobs.end_s[job] = self.now_s

    def requeue(self, job: int, duration_s: float) -> None:
        """End a running job as a failure does, and queue it again with what it has left to do."""
        jobs, partition = self.jobs, self.partition_of[job]
        self.partitions[partition].release(job, self.now_s)
        jobs.start_s[job] = jobs.end_s[job] = -1.0
        jobs.duration_s[job] = duration_s
        self.partitions[partition].submit(job)
        self._dirty.add(partition)

    def repair(self, partition: int, node: int) -> None:
        """A node that has failed comes back."""
        self.partitions[partition].pool.repair(node)
        self.partitions[partition].nodes_changed()
        self._dirty.add(partition)

    @property
    def next_s(self) -> float:
        """When the next event is; infinite if there is none."""
        arrival_s = self.jobs.submit_s[self._next_arrival] if self._next_arrival < self._num_arrivals else float("inf")
        return min(arrival_s, self._heap[0][0] if self._heap else float("inf"))

    @property
    def idle(self) -> bool:
        """Whether no job waits, runs or is still to come."""
        return self._next_arrival >= self._num_arrivals and not any(
            partition.num_waiting or partition.allocations for partition in self.partitions
        )

    def run(self, until_s: float = float("inf")) -> None:
        """Handle events up to and including `until_s`; may be called again to go on."""
        heap, jobs = self._heap, self.jobs
        submit_s, partition_of, partitions = jobs.submit_s, self.partition_of, self.partitions
        dirty = self._dirty
        infinity = float("inf")
        while True:
            now_s = submit_s[self._next_arrival] if self._next_arrival < self._num_arrivals else infinity
            if heap and heap[0][0] < now_s:
                now_s = heap[0][0]
            if now_s > until_s or now_s == infinity:
                break
            self.now_s = now_s
            while heap and heap[0][0] == now_s and heap[0][1] == JOB_END:
                self._end(heapq.heappop(heap))
            arrival = self._next_arrival
            while arrival < self._num_arrivals and submit_s[arrival] == now_s:
                partition = partition_of[arrival]
                partitions[partition].submit(arrival)
                dirty.add(partition)
                arrival += 1
                self.num_events += 1
            self._next_arrival = arrival
            if dirty:
                self._schedule()
            while heap and heap[0][0] == now_s and heap[0][1] == CALL:
                self.num_events += 1
                heapq.heappop(heap)[3]()
                if dirty:
                    self._schedule()

    def _schedule(self) -> None:
        if len(self._dirty) == 1:
            self.partitions[self._dirty.pop()].schedule(self.now_s)
            return
        for partition in sorted(self._dirty):
            self.partitions[partition].schedule(self.now_s)
        self._dirty.clear()

    def _started(self, job: int) -> None:
        jobs, now_s = self.jobs, self.now_s
        end_s = now_s + jobs.duration_s[job]
        jobs.end_s[job] = end_s
        if end_s != float("inf"):
            heapq.heappush(self._heap, (end_s, JOB_END, job, now_s))
        if self.on_start and job in self.on_start:
            self.on_start[job](job)

    def _end(self, event: tuple[float, int, int, Any]) -> None:
        end_s, _, job, start_s = event
        jobs = self.jobs
        if jobs.start_s[job] != start_s or jobs.end_s[job] != end_s:
            return  # it was requeued, or ended otherwise, since this was foreseen
        partition = self.partition_of[job]
        if job not in self.partitions[partition].allocations:
            return
        self.num_events += 1
        if self.on_end and job in self.on_end:
            self.on_end[job](job)
        self.partitions[partition].release(job, end_s)
        self._dirty.add(partition)
