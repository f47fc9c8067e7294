"""What a bundle says about itself: progress.json about every second, and its timeline where that was asked for."""

from __future__ import annotations

import os
import resource
import time
from bisect import bisect_left, bisect_right
from itertools import pairwise

from hydro_slurm.clock import Clock
from hydro_slurm.gate.quanta import Run
from hydro_slurm.model import BundleProgress, BundleSpec
from hydro_slurm.timeline import TimelineWriter
from hydro_trials.runtime.bundle_dir import BundleDir
from hydro_trials.runtime.gating import BundleGate


class ProgressReporter:
    """Writes both; holds the ends of steps until the run of quanta that they fall into has ended."""

    def __init__(self, spec: BundleSpec, files: BundleDir, gate: BundleGate, clock: Clock) -> None:
        self._spec, self._files, self._gate, self._clock = spec, files, gate, clock
        self._timeline: TimelineWriter | None = None
        if spec.timeline:
            slot = spec.slot
            self._timeline = TimelineWriter(files.timeline, slot.node, slot.job_id, slot.local_rank, clock=clock)
        self._step_ends_ns: list[int] = []
        self._changes: list[tuple[int, int]] = [(0, 0)]
        """Since when (ns) there have been how many lanes; the first entry is older than any open run."""

    def step_done(self) -> None:
        """Note that all lanes have finished one optimizer step."""
        if self._timeline is not None:
            self._step_ends_ns.append(self._clock.monotonic_ns())

    def lanes_changed(self, num_lanes: int) -> None:
        """Note that there are now this many lanes."""
        self._gate.set_num_lanes(num_lanes)
        self._changes.append((self._clock.monotonic_ns(), num_lanes))

    def write(
        self,
        state: str,
        *,
        num_lanes: int,
        num_waiting: int,
        lane_steps: int,
        checkpoints: dict[str, str],
        steps: dict[str, int],
        max_lanes: int,
        warning: str,
    ) -> None:
        """Replace progress.json; append to the timeline."""
        progress = BundleProgress(
            bundle=self._spec.bundle,
            pid=os.getpid(),
            state=state,
            num_lanes=num_lanes,
            num_waiting=num_waiting,
            lane_steps=lane_steps,
            compute_s=self._gate.compute_ns / 1e9,
            cpu_s=time.process_time(),
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            quantum_p99_us=self._gate.quantum_p99_ns / 1e3,
            last_inbox=self._files.last_inbox,
            written_at_s=self._clock.wall_s(),
            checkpoints=checkpoints,
            steps=steps,
            max_lanes=max_lanes,
            warning=warning,
        )
        self._files.write_progress(progress)
        runs = self._gate.take_runs()  # taken even if nobody wants them: they would pile up
        if self._timeline is not None:
            for run in runs:
                self._add(self._timeline, run)
            self._timeline.flush()

    def _add(self, timeline: TimelineWriter, run: Run) -> None:
        """Add one run; where the number of lanes changed in it, in parts that share its quanta by their duration."""
        edges_ns = [at for at, _ in self._changes if run.start_ns < at < run.end_ns]
        for start_ns, end_ns in pairwise([run.start_ns, *edges_ns, run.end_ns]):
            while len(self._changes) > 1 and self._changes[1][0] <= start_ns:
                del self._changes[0]
            first, last = bisect_left(self._step_ends_ns, start_ns), bisect_right(self._step_ends_ns, end_ns)
            share = (end_ns - start_ns) / max(1, run.end_ns - run.start_ns)
            timeline.add(
                "quantum",
                start_ns,
                end_ns - start_ns,
                lanes=self._changes[0][1],
                num_steps=last - first,
                num_quanta=round(run.num_quanta * share),
            )
            del self._step_ends_ns[:last]
