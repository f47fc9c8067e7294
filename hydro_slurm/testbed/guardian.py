"""Takes a testbed down when its creator dies, however it dies. Arguments: state folder, creator's pid and start.

Runs in a session of its own, so that a Ctrl-C meant for the creator does not reach it. SIGTERM releases it.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hydro_slurm.errors import HydroError
from hydro_slurm.testbed import record as records
from hydro_slurm.testbed.processes import Process
from hydro_slurm.testbed.teardown import take_down

_ATTEMPTS = 5


def main(argv: Sequence[str]) -> int:
    state, creator = Path(argv[1]), Process(int(argv[2]), int(argv[3]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    wait_for_death(creator)
    for attempt in range(_ATTEMPTS):
        try:
            if state.exists():
                take_down(state)
            records.remove_leftovers(state.parent)
            return 0
        except (HydroError, OSError) as error:
            sys.stderr.write(f"attempt {attempt + 1} to take {state} down: {error}\n")
            time.sleep(1.0)
    return 1


def wait_for_death(process: Process) -> None:
    """Block until the process is dead (or its pid is somebody else's)."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        return
    while process.alive():  # a zombie counts as dead, but makes the descriptor readable too
        select.select([descriptor], [], [], 60.0)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
