"""What a bundle says about itself: progress.json about every second, and its timeline where that was asked for."""

from __future__ import annotations

import os
import resource
import time
from bisect import bisect_left

from hydro_slurm.clock import Clock
from hydro_slurm.model import BundleProgress, BundleSpec
from hydro_slurm.timeline import TimelineWriter
from hydro_trials.runtime.bundle_dir import BundleDir
from hydro_trials.runtime.gating import BundleGate


class ProgressReporter:
    """Writes both; holds the ends of steps until the run of quanta that they fall into is known."""

    def __init__(self, spec: BundleSpec, files: BundleDir, gate: BundleGate, clock: Clock) -> None:
        self._spec, self._files, self._gate, self._clock = spec, files, gate, clock
        self._timeline: TimelineWriter | None = None
        if spec.timeline:
            slot = spec.slot
            self._timeline = TimelineWriter(files.timeline, slot.node, slot.job_id, slot.local_rank, clock=clock)
        self._step_ends_ns: list[int] = []
        self._num_lanes = 0

    def step_done(self, num_lanes: int) -> None:
        """Note that all lanes have finished one optimizer step."""
        if self._timeline is None:
            return
        if num_lanes != self._num_lanes:
            self._gate.cut_run()  # a run in the timeline has one number of lanes
            self._flush()
            self._num_lanes = num_lanes
        self._step_ends_ns.append(self._clock.monotonic_ns())

    def write(
        self,
        state: str,
        *,
        num_lanes: int,
        num_waiting: int,
        lane_steps: int,
        checkpoints: dict[str, str],
        steps: dict[str, int],
    ) -> None:
        """Replace progress.json; append to the timeline."""
        self._gate.note_lanes(num_lanes)
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
        )
        self._files.write_progress(progress)
        if self._timeline is not None:
            if state == "ended":
                self._gate.cut_run()
            self._flush()

    def _flush(self) -> None:
        assert self._timeline is not None
        for start_ns, end_ns, num_quanta in self._gate.take_runs():
            first, last = bisect_left(self._step_ends_ns, start_ns), bisect_left(self._step_ends_ns, end_ns + 1)
            self._timeline.add(
                "quantum",
                start_ns,
                end_ns - start_ns,
                lanes=self._num_lanes,
                num_steps=last - first,
                num_quanta=num_quanta,
            )
            del self._step_ends_ns[:last]
        self._timeline.flush()
