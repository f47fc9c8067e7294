"""A bundle in the study's own allocation: an ordinary process with the interface of a step."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydro_slurm.errors import SlurmUnavailableError


class LocalProcess:
    """Runs a command beside the controller, inside the same job. Its supervisor ends it if the controller dies."""

    def __init__(self, name: str, argv: Sequence[str], *, env: Mapping[str, str], output: Path) -> None:
        self.name = name
        self._cancelled = False
        with output.open("ab") as file:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def poll(self) -> int | None:
        """Null while it runs, then its exit status (128 plus the number, if a signal ended it)."""
        status = self._process.poll()
        return 128 - status if status is not None and status < 0 else status

    def wait(self, timeout_s: float) -> int:
        """Wait for its end and return its exit status."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise SlurmUnavailableError(f"{self.name} still runs after {timeout_s:.0f} s") from None
        return self.poll() or 0

    def state(self) -> str:
        """RUNNING, COMPLETED, FAILED or CANCELLED."""
        status = self.poll()
        if status is None:
            return "RUNNING"
        if self._cancelled:
            return "CANCELLED"
        return "COMPLETED" if status == 0 else "FAILED"

    def message(self) -> str:
        """Nothing: its output is all it says."""
        return ""

    def terminate(self) -> None:
        """Ask it to end."""
        if self._process.poll() is None:
            self._cancelled = True
            self._process.terminate()
