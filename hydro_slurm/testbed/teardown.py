"""Ends a testbed: no process of it is left, then its folder goes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from hydro_slurm.errors import TestbedError
from hydro_slurm.testbed import record as records
from hydro_slurm.testbed.processes import boot_id, kill_members, wait_dead

_GUARDIAN_GRACE_S = 5.0


def take_down(state: Path) -> None:
    """End all processes of the testbed in this folder, check that none is left, remove the folder.

    Raises:
        TestbedError: There is no testbed, or a process of it cannot be ended.
    """
    record = records.load(state)
    same_boot = record.boot_id == boot_id()
    if same_boot:
        # slurmctld first: it would start jobs anew on the nodes that are left.
        order = sorted(record.daemons.items(), key=lambda item: item[0] != "slurmctld")
        kill_members(record.uuid, first=[process for _, process in order])
    records.remove(state)
    # The guardian is released last: should we be killed in mid-work, it goes on.
    guardian = record.guardian
    if same_boot and guardian is not None and guardian.pid != os.getpid():
        guardian.send(signal.SIGTERM)
        if not wait_dead([guardian], _GUARDIAN_GRACE_S):
            guardian.send(signal.SIGKILL)


def clean_stale(base: Path) -> list[str]:
    """Take down all testbeds in the base folder that nobody will use again; return their names."""
    cleaned = []
    for state in records.folders(base):
        try:
            if not records.load(state).stale:
                continue
            take_down(state)
        except TestbedError:
            if state.exists():
                raise
        cleaned.append(state.name)
    records.remove_leftovers(base)
    return cleaned
