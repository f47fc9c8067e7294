"""Host jobs in the simulation: jobs of the base load that offer slots while they run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydro_sim.bubbles import StageOffer, stage_offers
from hydro_sim.settings import HostConfig, Scenario
from hydro_sim.traces import TraceJob
from hydro_slurm.model import HOST_COMMENT
from hydro_slurm.policy import HostOffer, HostPolicy, Slot, why_not


@dataclass(slots=True)
class HostJob:
    """One host job."""

    id: str
    config: HostConfig
    devices: int
    user: str
    offers: list[StageOffer]
    submit_s: float
    duration_s: float
    partition: int
    device_type: str
    job: int = -1
    start_s: float = -1.0
    """Of its present run."""
    first_start_s: float = -1.0
    end_s: float = -1.0
    work_left_s: float = 0.0
    run_s: float = 0.0
    """Time in which it has held its devices, failed runs included."""
    offered_s: float = 0.0
    """Time in which its slots were offered."""
    offering_since_s: float = -1.0
    num_failures: int = 0
    slots: list[Slot] = field(default_factory=list)
    refusal: str = ""
    """Why it does not qualify as a host."""

    @property
    def limit_s(self) -> float:
        return self.config.limit_h * 3600 or float("inf")

    def time_left_s(self, now_s: float) -> float | None:
        """Until its time limit."""
        return None if self.limit_s == float("inf") else self.start_s + self.limit_s - now_s

    def offer_slots(self, now_s: float, policy: HostPolicy, owner: str) -> list[Slot]:
        """The slots of its devices, if it qualifies; stages hold equal numbers of devices.

        Args:
            now_s: The moment.
            policy: What qualifies.
            owner: Only this user's studies may use them; empty: anybody's.
        """
        offer = HostOffer(
            shares=True,
            has_live_gates=any(offer.throughput_share > 0 for offer in self.offers),
            num_stages=len(self.offers),
            age_s=now_s - self.start_s,
            time_left_s=self.time_left_s(now_s),
        )
        self.refusal = why_not(offer, policy)
        if self.refusal:
            return []
        self.offering_since_s = now_s
        per_stage = self.devices // len(self.offers)
        self.slots = [
            Slot(
                id=f"{self.id}.{stage}.{index}",
                bubble_s_per_s=offer.throughput_share,
                free_bytes=offer.free_bytes,
                device_type=self.device_type,
                user=owner,
            )
            for stage, offer in enumerate(self.offers)
            for index in range(per_stage)
            if offer.throughput_share > 0
        ]
        return self.slots

    def withdraw_slots(self, now_s: float) -> None:
        """Its slots are gone."""
        if self.offering_since_s >= 0:
            self.offered_s += now_s - self.offering_since_s
        self.offering_since_s = -1.0
        self.slots = []

    def count_run(self, now_s: float) -> None:
        """A run of it has ended."""
        self.run_s += now_s - self.start_s

    def lose_work(self, now_s: float) -> float:
        """After a failure: work since the last checkpoint is done again. Returns what is left."""
        every_s = self.config.checkpoint_every_s
        done_s = (now_s - self.start_s) / (1 + self.config.slowdown)
        self.work_left_s -= done_s // every_s * every_s
        self.num_failures += 1
        return self.work_left_s * (1 + self.config.slowdown)


def is_host(job: TraceJob, config: HostConfig) -> bool:
    """Whether a job of the trace is one of these hosts: it has offered its bubbles, or is large and long enough.

    Its devices must divide into the stages.
    """
    if not config.from_trace_devices or job.num_devices % config.num_stages:
        return False
    is_large = job.num_devices >= config.from_trace_devices and job.duration_s >= config.from_trace_hours * 3600
    return is_large or HOST_COMMENT in job.comment.split()


def make_hosts(scenario: Scenario, folder: Path, traced: Sequence[tuple[TraceJob, float, int]] = ()) -> list[HostJob]:
    """All host jobs, with submit times and durations drawn.

    Args:
        scenario: What to simulate.
        folder: Where relative paths start.
        traced: Jobs of the trace that are hosts: job, submit time in the simulation, partition.
    """
    names = [partition.name for partition in scenario.partitions]
    hosts = []
    for position, config in enumerate(scenario.hosts):
        draw = random.Random(f"{scenario.seed} hosts {position}")
        offers = stage_offers(config, scenario.bubbles, folder)
        partition = names.index(config.partition) if config.partition else 0
        if config.from_trace_devices:
            mine = [entry for entry in traced if is_host(entry[0], config)]
            hosts += [_traced_host(config, offers, number, entry, scenario) for number, entry in enumerate(mine)]
            continue
        for number in range(config.count):
            factor = draw.lognormvariate(0.0, config.duration_spread) if config.duration_spread else 1.0
            duration_s = config.duration_h * 3600 * factor
            submit_h = config.submit_h + (draw.uniform(0, config.over_h) if number and config.over_h else 0.0)
            hosts.append(
                HostJob(
                    id=config.name if config.count == 1 else f"{config.name}-{number:03d}",
                    config=config,
                    devices=config.devices,
                    user=config.user,
                    offers=offers,
                    submit_s=submit_h * 3600,
                    duration_s=duration_s,
                    partition=partition,
                    device_type=scenario.partitions[partition].device_type,
                    work_left_s=duration_s,
                )
            )
    return hosts


def _traced_host(
    config: HostConfig, offers: list[StageOffer], number: int, entry: tuple[TraceJob, float, int], scenario: Scenario
) -> HostJob:
    job, submit_s, partition = entry
    return HostJob(
        id=f"{config.name}-{number:03d}",
        config=config,
        devices=job.num_devices,
        user=job.user or config.user,
        offers=offers,
        submit_s=submit_s,
        duration_s=job.duration_s,
        partition=partition,
        device_type=scenario.partitions[partition].device_type,
        work_left_s=job.duration_s,
    )
