"""Own mode's back end of the reconcile loop: one study, the same user's host jobs, bundles as overlapping steps."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hydro_slurm.clock import Clock
from hydro_slurm.daemon import World
from hydro_slurm.errors import SlurmError, SlurmUnavailableError
from hydro_slurm.model import BundleSlot, BundleSpec, Device, InboxMessage, LaneSpec, SlotReport, TrialResult
from hydro_slurm.policy import Demand, Finish, Launch, Refill, RunningBundle, SizingPolicy, Slot, ThroughputCurve
from hydro_slurm.slurm import StepProcess
from hydro_slurm.study.bundle_files import BundleFiles
from hydro_slurm.study.description import StudyRecord
from hydro_slurm.study.grouping import Group, group_of
from hydro_slurm.study.hosts import HostView, HostWatch
from hydro_slurm.study.launching import BundleLauncher

logger = logging.getLogger(__name__)

EXIT_GATE_GONE = 76
"""A bundle's exit status when its host has left."""

MAX_COOL_DOWN_S = 60.0


class TrialSource(Protocol):
    """Where trials come from and where their results go: the search, or the verification."""

    @property
    def num_waiting(self) -> int: ...
    @property
    def finished(self) -> bool: ...
    def take(self, count: int, group: Group | None = None) -> list[LaneSpec]: ...
    def give_back(self, trials: set[int], checkpoints: dict[int, str], *, lost: bool) -> None: ...
    def record(self, results: list[TrialResult]) -> list[int]: ...


@dataclass(slots=True)
class _Bundle:
    id: str
    slot_id: str
    slot: BundleSlot
    purpose: str
    max_lanes: int
    files: BundleFiles
    process: StepProcess
    trials: set[int]
    """Trials handed to it that have not ended."""
    group: Group
    """What they agree in, and whoever joins them must."""
    finishing: bool = False
    warning: str = ""


class OwnModeBackend:
    """Reads and changes the world of one study."""

    def __init__(
        self,
        directory: Path,
        record: StudyRecord,
        hosts: HostWatch,
        launcher: BundleLauncher,
        clock: Clock,
    ) -> None:
        self.directory, self.record = directory, record
        self.sources: dict[str, TrialSource] = {}
        """By purpose; demands are served in this order."""
        self._hosts, self._launcher, self._clock = hosts, launcher, clock
        self._bundles: dict[str, _Bundle] = {}
        self._reports: dict[str, SlotReport] = {}
        names = [path.name[1:] for path in (directory / "bundles").iterdir()]
        self._num_launched = max((int(name) for name in names if name.isdigit()), default=0)
        self._failures: dict[str, tuple[int, float]] = {}

    @property
    def bundles(self) -> list[_Bundle]:
        """The bundles that run now."""
        return list(self._bundles.values())

    def read(self) -> World:
        """Take in results, reap ended bundles, and describe slots, bundles and demands."""
        view = self._hosts.view()
        for bundle in self.bundles:
            self._take_in(bundle)
            status = bundle.process.poll()
            if status is not None:
                self._reap(bundle, status, view)
        self._reports = {slot_id(report): report for report in view.reports}
        return World(self._demands(), self._slots(view), tuple(map(self._describe, self.bundles)), view.away)

    def launch(self, launch: Launch) -> None:
        """Start a bundle on a slot; its trials go back to waiting if that fails."""
        source = self.sources[launch.purpose]
        lanes = source.take(launch.num_lanes)
        if not lanes:
            return
        self._num_launched += 1
        name = f"b{self._num_launched:03d}"
        description, settings = self.record.description, self.record.settings
        spec = BundleSpec(
            bundle=name,
            study=self.record.name,
            study_dir=str(self.directory),
            study_file=self.record.file,
            purpose=launch.purpose,
            width_scale=description.width_scale if launch.purpose == "search" else 1.0,
            max_lanes=max(self._max_lanes(launch.purpose), len(lanes)),
            lanes=tuple(lanes),
            rungs=description.rungs if launch.purpose == "search" else description.rungs[-1:],
            slot=self._bundle_slot(launch.slot_id),
            quantum_ms=self._quantum_ms(launch.slot_id),
            memory_cap_bytes=None if launch.slot_id == "own" else settings.bundle_mem_mib << 20,
            checkpoint_every_s=settings.checkpoint_every_s,
            timeline=settings.timeline,
        )
        trials = {lane.trial for lane in lanes}
        try:
            files = BundleFiles.create(self.directory / "bundles" / name, spec)
            process = self._launcher.launch(spec)
        except (SlurmError, OSError) as error:
            source.give_back(trials, {}, lost=False)
            self._hosts.refresh()
            self._note_failure(launch.slot_id)
            if isinstance(error, SlurmUnavailableError):
                raise
            logger.warning("bundle=%s could not start on slot=%s: %s", name, launch.slot_id, error)
            return
        self._bundles[name] = _Bundle(
            name,
            launch.slot_id,
            spec.slot,
            launch.purpose,
            spec.max_lanes,
            files,
            process,
            trials,
            group_of(lanes[0], self.record.separates),
        )
        logger.info("bundle=%s purpose=%s slot=%s lanes=%d started", name, launch.purpose, launch.slot_id, len(lanes))

    def refill(self, refill: Refill) -> None:
        """Hand more trials to a bundle."""
        bundle = self._bundles[refill.bundle_id]
        lanes = self.sources[bundle.purpose].take(refill.num_lanes, bundle.group)
        if not lanes and not bundle.trials:
            self.finish(Finish(bundle.id, "no trial that waits may share this bundle"))
        if lanes:
            bundle.trials.update(lane.trial for lane in lanes)
            bundle.files.send(InboxMessage("refill", lanes=tuple(lanes)))

    def finish(self, finish: Finish) -> None:
        """Make a bundle checkpoint its lanes and leave."""
        bundle = self._bundles[finish.bundle_id]
        if not bundle.finishing:
            bundle.finishing = True
            bundle.files.send(InboxMessage("finish", reason=finish.reason))

    def _take_in(self, bundle: _Bundle) -> None:
        self._heed(bundle)
        results = bundle.files.new_results()
        if not results:
            return
        stopped = self.sources[bundle.purpose].record(results)
        bundle.trials.difference_update(result.trial for result in results if result.state != "RUNNING")
        bundle.trials.difference_update(stopped)
        if stopped:
            bundle.files.send(InboxMessage("stop", trials=tuple(stopped), reason="pruned"))
        self._failures.pop(bundle.slot_id, None)

    def _heed(self, bundle: _Bundle) -> None:
        """What a bundle says about itself: how many lanes it can really have, and why."""
        progress = bundle.files.progress()
        if progress is None:
            return
        if progress.max_lanes:
            bundle.max_lanes = progress.max_lanes
        if progress.warning and progress.warning != bundle.warning:
            bundle.warning = progress.warning
            logger.warning("bundle=%s says: %s", bundle.id, progress.warning)

    def _reap(self, bundle: _Bundle, status: int, view: HostView) -> None:
        self._take_in(bundle)
        del self._bundles[bundle.id]
        if status not in (0, EXIT_GATE_GONE):
            self._hosts.refresh()
            view = self._hosts.view()  # whether its host has ended is seen only now
        host_left = bundle.slot.kind == "bubble" and (
            status == EXIT_GATE_GONE or bundle.slot.job_id not in {job.job_id for job in view.jobs}
        )
        lost = status != 0 and not host_left
        num_back = len(bundle.trials)
        self.sources[bundle.purpose].give_back(bundle.trials, bundle.files.checkpoints(), lost=lost)
        if lost:
            self._note_failure(bundle.slot_id)
        if status != 0:
            self._hosts.refresh()
        logger.log(
            logging.WARNING if lost else logging.INFO,
            "bundle=%s ended status=%d trials_back=%d log=%s",
            bundle.id,
            status,
            num_back,
            bundle.files.directory / "log",
        )

    def _demands(self) -> tuple[Demand, ...]:
        return tuple(
            Demand(purpose=name, num_waiting=source.num_waiting, sizing=self._sizing(name))
            for name, source in self.sources.items()
        )

    def _sizing(self, purpose: str) -> SizingPolicy:
        record = self.record
        lane_bytes = record.lane_bytes if purpose == "search" else record.target_lane_bytes
        curve = None
        if purpose == "search" and record.throughput:
            curve = ThroughputCurve(tuple((round(lanes), rate) for lanes, rate in record.throughput))
        return SizingPolicy(max_lanes=self._max_lanes(purpose), lane_bytes=lane_bytes, curve=curve)

    def _max_lanes(self, purpose: str) -> int:
        description = self.record.description
        if purpose != "search":
            return max(description.top_k, 1)
        return min(description.max_lanes, self.record.knee_lanes or description.max_lanes)

    def _slots(self, view: HostView) -> tuple[Slot, ...]:
        taken = {bundle.slot_id for bundle in self.bundles}
        now_s = self._clock.wall_s()
        slots = []
        for report in view.reports:
            name = slot_id(report)
            cooling = self._failures.get(name, (0, 0.0))[1] > now_s
            usable = report.bubble_s_per_s > 0 and not view.away and not cooling
            if name in taken or usable:
                slots.append(
                    Slot(
                        id=name,
                        bubble_s_per_s=report.bubble_s_per_s,
                        free_bytes=report.free_bytes,
                        shut=report.guard.state == "shut",
                    )
                )
        if self._own_allocation_usable(now_s, bool(view.jobs)) and self._failures.get("own", (0, 0.0))[1] <= now_s:
            slots.append(Slot(id="own", kind="own"))
        return tuple(slots)

    def _own_allocation_usable(self, now_s: float, has_hosts: bool) -> bool:
        settings = self.record.settings
        if settings.own_allocation == "when_no_host":
            return not has_hosts and now_s - self._hosts.last_seen_s >= settings.host_wait_s
        return settings.own_allocation == "always"

    def _bundle_slot(self, name: str) -> BundleSlot:
        if name == "own":
            return BundleSlot(kind="own", node=os.environ.get("SLURMD_NODENAME", socket.gethostname()), device=Device())
        report = self._reports[name]
        return BundleSlot(
            kind="bubble",
            node=report.node,
            device=report.device,
            gate_dir=report.gate_dir,
            job_id=report.job_id,
            local_rank=report.local_rank,
        )

    def _quantum_ms(self, name: str) -> float | None:
        """Half of a short bubble: a longer quantum could begin in few of them."""
        gap_ms = self._reports[name].gap_quantiles_ms.get("p25") if name in self._reports else None
        return gap_ms / 2 if gap_ms else None

    def _describe(self, bundle: _Bundle) -> RunningBundle:
        num_lanes = min(len(bundle.trials), bundle.max_lanes)
        return RunningBundle(
            id=bundle.id,
            slot_id=bundle.slot_id,
            purpose=bundle.purpose,
            num_lanes=num_lanes,
            num_waiting=len(bundle.trials) - num_lanes,
            max_lanes=bundle.max_lanes,
            finishing=bundle.finishing,
        )

    def _note_failure(self, name: str) -> None:
        """Leave a slot alone for a while, longer with every failure in a row."""
        count = self._failures.get(name, (0, 0.0))[0] + 1
        self._failures[name] = (count, self._clock.wall_s() + min(2.0**count, MAX_COOL_DOWN_S))


def slot_id(report: SlotReport) -> str:
    """A slot's name in plans and logs: JOB.NODE.RANK."""
    return f"{report.job_id}.{report.node}.{report.local_rank}"
