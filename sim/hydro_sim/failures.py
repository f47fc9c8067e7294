"""Failures of nodes and of host jobs, as Poisson processes."""

from __future__ import annotations

import random

from hydro_sim.engine import Engine
from hydro_sim.host_jobs import HostJob
from hydro_sim.overlay import Overlay
from hydro_sim.settings import FailureConfig


class Failures:
    """Makes nodes and hosts of a simulation fail. Jobs of the base load start over when their node fails."""

    def __init__(self, engine: Engine, overlay: Overlay, config: FailureConfig, seed: str) -> None:
        self.engine, self.overlay, self.config = engine, overlay, config
        self.num_node_failures = self.num_host_failures = 0
        self._draw = random.Random(seed)
        if config.node_mtbf_h:
            self._next_node_failure()
        if config.host_mtbf_h and overlay.hosts:
            self._next_host_failure()

    def _next_node_failure(self) -> None:
        num_nodes = sum(partition.pool.num_nodes for partition in self.engine.partitions)
        gap_s = self._draw.expovariate(num_nodes / (self.config.node_mtbf_h * 3600))
        self.engine.call_at(self.engine.now_s + gap_s, self._fail_node)

    def _fail_node(self) -> None:
        engine = self.engine
        if engine.idle:
            return  # everything has ended: nothing is left to fail
        self._next_node_failure()
        index, node = self._draw_node()
        partition = engine.partitions[index]
        if partition.pool.free[node] < 0:
            return
        self.num_node_failures += 1
        partition.pool.fail(node)
        hit = [job for job, held in partition.allocations.items() if _uses(held, node)]
        hosts = {host.job: host for host in self.overlay.hosts}
        studies = {study.job: study for study in self.overlay.studies.values() if study.job >= 0}
        for job in sorted(hit):
            if job in hosts:
                self.overlay.fail_host(hosts[job])
            elif job in studies:
                self.overlay.fail_study_job(studies[job])
            else:
                engine.requeue(job, engine.jobs.duration_s[job])
        engine.call_at(engine.now_s + self.config.repair_h * 3600, lambda: engine.repair(index, node))

    def _draw_node(self) -> tuple[int, int]:
        """Partition and number of a node; each is as likely as any other."""
        sizes = [partition.pool.num_nodes for partition in self.engine.partitions]
        number = self._draw.randrange(sum(sizes))
        index = 0
        while number >= sizes[index]:
            number -= sizes[index]
            index += 1
        return index, number

    def _next_host_failure(self) -> None:
        gap_s = self._draw.expovariate(len(self.overlay.hosts) / (self.config.host_mtbf_h * 3600))
        self.engine.call_at(self.engine.now_s + gap_s, self._fail_some_host)

    def _fail_some_host(self) -> None:
        """Draws among all hosts, so that each has its rate whether others run or not."""
        if all(host.end_s >= 0 for host in self.overlay.hosts):
            return
        self._next_host_failure()
        host: HostJob = self._draw.choice(self.overlay.hosts)
        if host.start_s >= 0 and host.end_s < 0:
            self.num_host_failures += 1
            self.overlay.fail_host(host)


def _uses(allocation: object, node: int) -> bool:
    if isinstance(allocation, int):
        return allocation == node
    assert isinstance(allocation, tuple)
    return any(part[0] == node for part in allocation)
