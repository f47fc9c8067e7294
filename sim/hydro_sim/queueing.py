"""Slurm-like scheduling of one partition: first come first served, backfill, priority.

What Slurm does and this does not: preemption, reservations, licences, topology. The multifactor priority is
approximated by age and past usage: a job queues as if it had been submitted later the more device time its user has
asked for before. Ages grow alike for all jobs, so the order of two waiting jobs never changes, and a sorted queue does.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from hydro_sim.nodes import Allocation, NodePool
from hydro_slurm.errors import ConfigError

POLICIES = ("fifo", "backfill", "priority")


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """How the base load is scheduled."""

    policy: str = "backfill"
    """fifo: strictly first come, first served. backfill: later jobs may go ahead if they do not delay the first one.
    priority: backfill over a queue in the order of age and past usage."""
    depth: int = 100
    """Jobs that backfill looks at behind the first one (Slurm's bf_max_job_test)."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"scheduler.policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")
        if self.depth < 0:
            raise ConfigError(f"scheduler.depth must be 0 or more, got {self.depth}")


class Jobs:
    """All jobs, as columns: they are too many for an object each. Times in seconds."""

    __slots__ = ("devices", "duration_s", "end_s", "first_start_s", "limit_s", "priority_s", "start_s", "submit_s")

    def __init__(
        self,
        submit_s: list[float],
        duration_s: list[float],
        limit_s: list[float],
        devices: list[int],
        priority_s: list[float] | None = None,
    ) -> None:
        num_jobs = len(submit_s)
        self.submit_s, self.duration_s, self.limit_s, self.devices = submit_s, duration_s, limit_s, devices
        self.priority_s = priority_s or [0.0] * num_jobs
        """Head start in the queue, in seconds of waiting."""
        self.first_start_s = [-1.0] * num_jobs
        """-1 until it starts; a job that is requeued keeps its first."""
        self.start_s = [-1.0] * num_jobs
        """Of its last run; -1 while it waits."""
        self.end_s = [-1.0] * num_jobs

    def __len__(self) -> int:
        return len(self.submit_s)

    def add(self, submit_s: float, duration_s: float, limit_s: float, devices: int) -> int:
        """One more job; returns its index."""
        for column, value in (
            (self.submit_s, submit_s),
            (self.duration_s, duration_s),
            (self.limit_s, limit_s),
            (self.priority_s, 0.0),
            (self.first_start_s, -1.0),
            (self.start_s, -1.0),
            (self.end_s, -1.0),
        ):
            column.append(value)
        self.devices.append(devices)
        return len(self.submit_s) - 1


class Partition:
    """One partition: its nodes, its queue and its running jobs.

    Args:
        pool: The nodes.
        jobs: All jobs of the simulation; this partition sees those that are submitted to it.
        config: The scheduling policy.
        started: Called with each job that starts.
    """

    def __init__(self, pool: NodePool, jobs: Jobs, config: SchedulerConfig, started: Callable[[int], None]) -> None:
        self.pool, self.jobs, self.config = pool, jobs, config
        self.allocations: dict[int, Allocation] = {}
        self.busy_device_s = 0.0
        """Integral of the devices in use, from the events alone."""
        self._started = started
        self._counted_s = 0.0
        self._in_use = 0
        self._queue: list[tuple[float, int]] = []
        self._head = 0
        self._num_fresh = 0
        self._freed = False
        self._limits: list[tuple[float, int, int, float]] = []
        self._is_fifo = config.policy == "fifo"
        self._by_priority = config.policy == "priority"

    @property
    def num_waiting(self) -> int:
        return len(self._queue) - self._head

    def submit(self, job: int) -> None:
        """Queue a job. It starts in the next `schedule` at the earliest."""
        key = self.jobs.submit_s[job]
        if self._by_priority:
            key -= self.jobs.priority_s[job]
        insort(self._queue, (key, job), lo=self._head)
        self._num_fresh += 1

    def withdraw(self, job: int) -> None:
        """Take a job that waits out of the queue."""
        self._queue[self._head :] = [entry for entry in self._queue[self._head :] if entry[1] != job]

    def release(self, job: int, now_s: float) -> None:
        """A job has ended, or was ended: take its devices back."""
        num_devices = self.jobs.devices[job]
        self._count(now_s, -num_devices)
        self.pool.give_back(self.allocations.pop(job), num_devices)
        self._freed = True

    def nodes_changed(self) -> None:
        """Nodes have come back or gone."""
        self._freed = True

    def schedule(self, now_s: float) -> None:
        """Start what can start now."""
        queue, pool = self._queue, self.pool
        while self._head < len(queue):
            if not self._start(queue[self._head][1], now_s):
                break
            self._head += 1
        if self._head > 4096 and self._head * 2 > len(queue):
            del queue[: self._head]
            self._head = 0
        num_behind = len(queue) - self._head - 1
        if not self._is_fifo and num_behind > 0 and pool.num_free:
            first = self._head + 1
            if not self._freed and not self._by_priority:
                # Nothing has come free: only jobs that are new can be filled in, and they stand at the end.
                first = max(first, len(queue) - self._num_fresh)
            self._fill_in(first, now_s)
        self._freed = False
        self._num_fresh = 0

    def device_s_until(self, now_s: float) -> float:
        """Device-seconds held from the start up to now."""
        return self.busy_device_s + self._in_use * (now_s - self._counted_s)

    def _fill_in(self, first: int, now_s: float) -> None:
        """Start jobs behind the first one that end before it could start, or leave enough devices for it.

        When the first one could start is judged by numbers of devices alone (EASY backfill).
        """
        queue, jobs = self._queue, self.jobs
        end = min(len(queue), self._head + 1 + self.config.depth)
        if first >= end:
            return
        num_free = self.pool.num_free
        candidates = [i for i in range(first, end) if jobs.devices[queue[i][1]] <= num_free]
        if not candidates:
            return
        shadow_s, num_extra = self._shadow(jobs.devices[queue[self._head][1]])
        filled = []
        for i in candidates:
            job = queue[i][1]
            num_devices = jobs.devices[job]
            ends_before = now_s + jobs.limit_s[job] <= shadow_s
            if (ends_before or num_devices <= num_extra) and self._start(job, now_s):
                filled.append(i)
                if not ends_before:
                    num_extra -= num_devices
                if not self.pool.num_free:
                    break
        for i in reversed(filled):
            del queue[i]

    def _shadow(self, num_devices: int) -> tuple[float, int]:
        """When so many devices will be free at the latest, and how many more than that."""
        num_free = self.pool.num_free
        seen = []
        shadow_s = 0.0
        limits, start_s = self._limits, self.jobs.start_s
        while num_free < num_devices and limits:
            entry = heapq.heappop(limits)
            shadow_s, released, job, started_s = entry
            if job in self.allocations and start_s[job] == started_s:
                num_free += released
                seen.append(entry)
        for entry in seen:
            heapq.heappush(limits, entry)
        if num_free < num_devices:
            return float("inf"), 0  # nodes are down
        return shadow_s, num_free - num_devices

    def _start(self, job: int, now_s: float) -> bool:
        jobs = self.jobs
        num_devices = jobs.devices[job]
        allocation = self.pool.take(num_devices)
        if allocation is None:
            return False
        self._count(now_s, num_devices)
        self.allocations[job] = allocation
        jobs.start_s[job] = now_s
        if jobs.first_start_s[job] < 0:
            jobs.first_start_s[job] = now_s
        if not self._is_fifo:
            limits = self._limits
            heapq.heappush(limits, (now_s + jobs.limit_s[job], num_devices, job, now_s))
            if len(limits) > 2 * len(self.allocations) + 1024:
                limits[:] = [e for e in limits if e[2] in self.allocations and jobs.start_s[e[2]] == e[3]]
                heapq.heapify(limits)
        self._started(job)
        return True

    def _count(self, now_s: float, change: int) -> None:
        self.busy_device_s += self._in_use * (now_s - self._counted_s)
        self._counted_s = now_s
        self._in_use += change
