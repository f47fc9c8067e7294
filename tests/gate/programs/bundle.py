"""Bundles of every character, run under a supervisor: `bundle.py GATE_DIRECTORY CHARACTER`.

good        works in quanta, exits 7 when its gate is gone
parting     works in quanta for a while, takes its page away, computes on for a second and exits 3
rogue       says that it works in quanta, and never checks
endless     good, but does not leave when the gate is gone
starting    has no page and never gets one
obedient    like starting; exits 9 on SIGTERM
stubborn    like starting; ignores SIGTERM
family      like starting, with a child and a daemon of its own
"""

import os
import signal
import sys
import time
from pathlib import Path

from hydro_slurm.errors import GateGoneError
from hydro_slurm.gate.bundle_page import BundlePage
from hydro_slurm.gate.layout import RUNNING
from hydro_slurm.gate.quanta import QuantumGate
from hydro_slurm.gate.reader import GateReader

directory, character = Path(sys.argv[1]), sys.argv[2]


def spin(seconds: float) -> None:
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        pass


def leave(number: int, _frame: object) -> None:
    sys.exit(9)


if character == "obedient":
    signal.signal(signal.SIGTERM, leave)
elif character == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
elif character == "family":
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
        spin(60)
elif character == "rogue":
    page = BundlePage.create(directory, "b1")
    page.state = RUNNING
    page.publish()
elif character == "parting":
    gate = QuantumGate(GateReader.attach(directory), BundlePage.create(directory, "b1"))
    for _ in range(200):
        gate.check()
        spin(0.001)
    gate.begin_leaving()
    gate.page.close()
    spin(1.0)
    sys.exit(3)
elif character in ("good", "endless"):
    gate = QuantumGate(GateReader.attach(directory), BundlePage.create(directory, "b1"))
    try:
        while True:
            gate.check()
            spin(0.001)
    except GateGoneError:
        if character == "good":
            gate.page.close()
            sys.exit(7)
spin(60)
