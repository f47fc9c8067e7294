"""A host job for tests: one rank that multiplies matrices for a while and waits for a while, and shares the waits.

It uses the hook's reporter as a framework's adapter would. Real DeepSpeed hosts are tested with the hooks and the demo.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from pathlib import Path

import numpy as np

from hydro_slurm.gate.writer import GateWriter
from hydro_slurm.hooks.reporter import BubbleReporter
from hydro_slurm.hooks.slot_reports import SlotIdentity, SlotReports
from hydro_slurm.model import Device, gate_dir, run_dir, slot_report_dir


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--compute-ms", type=float, default=20)
    parser.add_argument("--gap-ms", type=float, default=80)
    parser.add_argument("--stop-file", type=Path, required=True)
    arguments = parser.parse_args()
    node, job_id = os.environ["SLURMD_NODENAME"], int(os.environ["SLURM_JOB_ID"])
    cpu = int(os.environ["SLURM_PROCID"]) % (os.cpu_count() or 1)
    os.sched_setaffinity(0, {cpu})
    directory = gate_dir(run_dir(), node, job_id, 0)
    reporter = BubbleReporter(GateWriter.create(directory, stage=0, num_stages=2))
    identity = SlotIdentity(node, job_id, 0, 0, 0, 2, Device(cpus=(cpu,)), directory)
    reports = SlotReports(reporter, identity, slot_report_dir(), report_s=1.0)
    reports.start()
    reporter.set_schedule("light")
    matrix = np.random.default_rng(0).normal(size=(128, 128))
    neighbour = threading.Event()  # never set: waiting for it is the bubble
    while not arguments.stop_file.exists():
        for _ in range(2):
            reporter.compute_begin("forward")
            end_s = time.monotonic() + arguments.compute_ms / 1e3
            while time.monotonic() < end_s:
                matrix @ matrix
            reporter.compute_end()
            neighbour.wait(arguments.gap_ms / 1e3)
        reporter.compute_begin("step")
        reporter.step_end()
    reporter.leave()
    reports.stop()


if __name__ == "__main__":
    main()
