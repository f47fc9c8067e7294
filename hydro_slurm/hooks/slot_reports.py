"""The slow half of a hook: side threads that tell the file system, now and then, what the reporter has learned.

Two daemon threads, because a report directory that hangs (a file server that is away) must not stop the heartbeat.
Nothing here is ever waited for by the training thread, and no failure gets out of here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional

from hydro_slurm.clock import Clock, SystemClock
from hydro_slurm.formats import write_record
from hydro_slurm.hooks.prediction import quantiles_ms
from hydro_slurm.hooks.reporter import BubbleReporter
from hydro_slurm.model import Device, SlotReport
from hydro_slurm.timeline import TimelineWriter

_log = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
REPORT_S = 15.0
FLUSH_S = 2.0


@dataclass(frozen=True)
class SlotIdentity:
    """Which slot it is that reports."""

    node: str
    job_id: int
    local_rank: int
    global_rank: int
    stage: int
    num_stages: int
    device: Device
    gate_dir: Path


class PeriodicThread(threading.Thread):
    """Calls `action` at once, then every `period_s` and when woken. Logs what it raises, when that changes."""

    def __init__(self, name: str, period_s: float, action: Callable[[], object]) -> None:
        super().__init__(name=name, daemon=True)
        self._period_s, self._action = period_s, action
        self._wake = threading.Event()
        self._stopping = False
        self._complaint = ""

    def run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            complaint = ""
            try:
                self._action()
            except Exception as error:
                complaint = f"{type(error).__name__}: {error}"
            if complaint and complaint != self._complaint:
                _log.warning("%s failed, training is not affected: %s", self.name, complaint)
            self._complaint = complaint
            self._wake.wait(self._period_s)

    def wake(self) -> None:
        """Act now."""
        self._wake.set()

    def stop(self, timeout_s: float = 2.0) -> None:
        """Ask it to end, and wait a little for that."""
        self._stopping = True
        self._wake.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout_s)


class SlotReports:
    """Heartbeat, report file and timeline of one slot, on side threads.

    Args:
        directory: The report directory; created if it is missing.
        report_s: Seconds between two reports.
    """

    def __init__(
        self,
        reporter: BubbleReporter,
        identity: SlotIdentity,
        directory: Path,
        *,
        report_s: float = REPORT_S,
        heartbeat_s: float = HEARTBEAT_S,
        timeline: Optional[TimelineWriter] = None,
        clock: Optional[Clock] = None,
        read_free_bytes: Optional[Callable[[], int]] = None,
    ) -> None:
        self._reporter, self._identity, self._directory = reporter, identity, directory
        self._timeline, self._clock = timeline, clock or SystemClock()
        self._read_free_bytes = read_free_bytes or free_memory_bytes
        self._heart = PeriodicThread("hydro-heartbeat", heartbeat_s, self._beat)
        self._scribe = PeriodicThread("hydro-report", report_s, self.write)
        self._flusher = PeriodicThread("hydro-timeline", FLUSH_S, timeline.flush) if timeline is not None else None
        self._written: Optional[Path] = None

    def start(self) -> None:
        self._heart.start()
        self._scribe.start()
        if self._flusher is not None:
            self._flusher.start()

    def wake(self) -> None:
        """Write a report now, on the side thread."""
        self._scribe.wake()

    def stop(self) -> None:
        """End the threads, flush the timeline, remove the report. Never raises."""
        self._heart.stop()
        self._scribe.stop()
        if self._flusher is not None:
            self._flusher.stop()
        with contextlib.suppress(Exception):
            if self._timeline is not None:
                self._timeline.flush()
        with contextlib.suppress(Exception):
            if self._written is not None:
                self._written.unlink()

    def write(self) -> None:
        """Write the report file.

        Raises:
            OSError: The directory cannot be written.
        """
        self._reporter.free_bytes = self._read_free_bytes()
        report = self.report()
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / report.file_name
        self._written = path
        write_record(path, report)

    def report(self) -> SlotReport:
        """The slot as it is now."""
        reporter, identity, predictor = self._reporter, self._identity, self._reporter.predictor
        learning, iteration_ns = reporter.learning, reporter.iteration_ns
        guard = reporter.guard.report(learning=learning)
        shared_ns = predictor.predicted_ns_per_iteration() * (1 - reporter.control_share)
        usable = iteration_ns is not None and guard.state == "open" and not reporter.disabled
        return SlotReport(
            node=identity.node,
            job_id=identity.job_id,
            local_rank=identity.local_rank,
            global_rank=identity.global_rank,
            pid=os.getpid(),
            gate_dir=str(identity.gate_dir),
            device=identity.device,
            stage=identity.stage,
            num_stages=identity.num_stages,
            iteration=reporter.iteration,
            iteration_s=None if iteration_ns is None else iteration_ns / 1e9,
            bubble_s_per_s=shared_ns / iteration_ns if usable and iteration_ns else 0.0,
            gap_quantiles_ms={} if learning else quantiles_ms(predictor.usable_durations_ns()),
            free_bytes=reporter.free_bytes,
            guard=guard,
            written_at_s=self._clock.wall_s(),
        )

    def _beat(self) -> None:
        self._reporter.heartbeat()


def free_memory_bytes() -> int:
    """What a neighbour may still use: the node's available memory, less where a cgroup gives less; 0 if unknown."""
    free = 0
    with contextlib.suppress(OSError, ValueError), Path("/proc/meminfo").open(encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) << 10
                break
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        group = next(line[3:] for line in lines if line.startswith("0::"))
        folder = Path("/sys/fs/cgroup") / group.lstrip("/")
        limit = int((folder / "memory.max").read_text(encoding="ascii"))
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        free = min(free, max(0, limit - used))
    return free
