"""A host job of a recorded run: one rank on one core that computes and waits, and shares the waits.

It uses the hook's reporter as a framework's adapter would, and ends after a number of iterations that is known before.
"""

from __future__ import annotations

import argparse
import os
import threading
import time

import numpy as np

from hydro_slurm.gate.writer import GateWriter
from hydro_slurm.hooks.guard import Guard
from hydro_slurm.hooks.reporter import BubbleReporter
from hydro_slurm.hooks.slot_reports import SlotIdentity, SlotReports
from hydro_slurm.model import Device, gate_dir, run_dir, slot_report_dir

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--core", type=int, required=True)
parser.add_argument("--iterations", type=int, required=True)
parser.add_argument("--compute-ms", type=float, required=True)
parser.add_argument("--gap-ms", type=float, required=True)
arguments = parser.parse_args()

node, job_id = os.environ["SLURMD_NODENAME"], int(os.environ["SLURM_JOB_ID"])
os.sched_setaffinity(0, {arguments.core})
directory = gate_dir(run_dir(), node, job_id, 0)
# A loose bound: a guard that shuts the slot of a busy machine would be measured here, not the replay.
guard = Guard(max_slowdown=0.5)
reporter = BubbleReporter(GateWriter.create(directory, stage=0, num_stages=2), guard=guard)
identity = SlotIdentity(node, job_id, 0, 0, 0, 2, Device(cpus=(arguments.core,)), directory)
reports = SlotReports(reporter, identity, slot_report_dir(), report_s=1.0)
reports.start()
reporter.set_schedule("two gaps")
matrix = np.random.default_rng(0).normal(size=(128, 128))
neighbour = threading.Event()  # never set: waiting for it is the bubble
for _ in range(arguments.iterations):
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
