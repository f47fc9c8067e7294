"""Every error that hydro_slurm raises on purpose. The command line prints them as one line and exits 1."""

from __future__ import annotations

import shlex
from collections.abc import Sequence


class HydroError(Exception):
    """Root of all errors that a user or an admin can do something about."""


class ConfigError(HydroError):
    """A setting has a value that cannot work."""


class FormatError(HydroError):
    """A file or message does not have the format that was expected of it."""


class GateError(HydroError):
    """A gate page cannot be created, mapped or written."""


class GateGoneError(GateError):
    """The gate's host has left, or its page is no longer one."""


class SlurmError(HydroError):
    """Anything that Slurm refuses, or does not answer."""


class SlurmCommandError(SlurmError):
    """A Slurm command exited with an error. Keeps the command, its exit status and its stderr."""

    def __init__(self, argv: Sequence[str], returncode: int, stderr: str) -> None:
        super().__init__(f"`{shlex.join(argv)}` exited {returncode}: {stderr.strip()}")
        self.argv, self.returncode, self.stderr = list(argv), returncode, stderr


class SlurmUnavailableError(SlurmError):
    """slurmctld does not answer (or a command timed out): try again later, conclude nothing."""


class SlurmNotFoundError(SlurmError):
    """Slurm does not know the job, step, node or partition that was asked for."""


class SlurmMissingError(SlurmError):
    """The Slurm client commands are not installed on this machine."""


class StudyError(HydroError):
    """A study file, or what it defines, cannot be used."""


class SurrogateError(HydroError):
    """A model cannot be shrunk, or its surrogate would not transfer."""


class SimulationError(HydroError):
    """A simulation cannot be set up as it is described."""


class TraceError(HydroError):
    """A trace cannot be read, or says what cannot be."""


class FusionError(HydroError):
    """A model or optimizer cannot be fused."""


class PlannerError(HydroError):
    """No way of running a study's lanes keeps to the limits."""


class TestbedError(HydroError):
    """The private cluster cannot be started, reached or stopped."""

    __test__ = False  # not a test class, whatever pytest makes of its name
