"""`python -m hydro_trials train BUNDLE_DIR`: one bundle, from its spec to its exit status.

Imports nothing heavy by itself: torch and the study come in during the yielding part of the start-up.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hydro_slurm.clock import SystemClock
from hydro_slurm.errors import GateGoneError, HydroError
from hydro_slurm.model import BundleSpec
from hydro_trials.runtime.bundle_dir import BundleDir
from hydro_trials.runtime.gating import BubbleSlotGate, BundleGate, OwnSlotGate, SlotGate
from hydro_trials.runtime.startup import bind_to_cpus, die_first_without_memory, keep_freed_memory, run_yielding

if TYPE_CHECKING:
    from hydro_trials.runtime.worker import BundleWorker

EXIT_GATE_GONE = 76


def train(directory: Path) -> int:
    """Run the bundle in `directory`; returns its exit status: 0, or 76 when the gate is gone.

    Raises:
        HydroError: The spec, the study or its model cannot be used; no lane has begun.
    """
    spec = BundleDir.read_spec(directory)
    clock = SystemClock()
    files = BundleDir(directory, clock)
    num_threads = max(1, len(spec.slot.device.cpus))
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    bind_to_cpus(spec.slot.device.cpus)
    keep_freed_memory()
    if spec.slot.kind == "bubble":
        die_first_without_memory()
    try:
        slot_gate: SlotGate
        if spec.slot.gate_dir is not None:
            slot_gate = BubbleSlotGate(Path(spec.slot.gate_dir), spec.bundle, clock)
        else:
            slot_gate = OwnSlotGate(clock)
        gate = BundleGate(slot_gate)
        signal.signal(signal.SIGTERM, gate.on_signal)
        prepare = _preparation(directory, spec, files, gate, num_threads)
        worker = run_yielding(prepare) if spec.slot.kind == "bubble" else prepare()
        import torch

        torch.set_num_threads(num_threads)  # counted per thread, and this is another one than prepared it
        return worker.run()
    except GateGoneError as error:
        files.event("left", reason=str(error), lanes=0)
        return EXIT_GATE_GONE
    except HydroError as error:
        files.event("failed", reason=str(error))
        raise


def _preparation(
    directory: Path, spec: BundleSpec, files: BundleDir, gate: BundleGate, num_threads: int
) -> Callable[[], BundleWorker]:
    def prepare() -> BundleWorker:
        import torch

        from hydro_trials.fusion import FusedTrainer
        from hydro_trials.runtime.plan import LanePlan
        from hydro_trials.runtime.warm_up import warm_up
        from hydro_trials.runtime.worker import BundleWorker
        from hydro_trials.study_file import load_data, load_study
        from hydro_trials.surrogate import study_surrogate

        torch.set_num_threads(num_threads)
        study = load_study(directory / spec.study_file)
        data = load_data(study)
        surrogate = study_surrogate(study, spec.width_scale, data)
        plan = LanePlan.of(
            lambda: FusedTrainer(study, surrogate, data, spec.rungs[-1], lambda site: None), spec
        )  # before any lane: nothing waits for the gate yet
        trainer = FusedTrainer(study, surrogate, data, spec.rungs[-1], gate.check)
        if spec.slot.kind == "bubble":
            warm_up(trainer, plan, min(spec.max_lanes, max(1, len(spec.lanes))))
        return BundleWorker(spec, files, study, trainer, plan, gate, SystemClock())

    return prepare
