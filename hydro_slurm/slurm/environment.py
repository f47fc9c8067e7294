"""Environments without what Slurm, or the user's habits, put into them."""

from __future__ import annotations

import os
from collections.abc import Mapping

_PREFIXES = (
    "SLURM_",
    "SLURMD_",
    "SBATCH_",
    "SRUN_",
    "SALLOC_",
    "SQUEUE_",
    "SINFO_",
    "SCANCEL_",
    "SCONTROL_",
    "PMI",
    "PMIX_",
)
_KEPT = frozenset({"SLURM_CONF"})


def scrubbed_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """A copy without the variables by which a surrounding job or a user's defaults would change Slurm commands.

    Only SLURM_CONF stays: it says which cluster is meant. Default: this process's environment.
    """
    source = os.environ if environment is None else environment
    return {name: value for name, value in source.items() if name in _KEPT or not name.startswith(_PREFIXES)}
