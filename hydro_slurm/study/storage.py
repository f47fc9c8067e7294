"""A study's Optuna storage: a journal file with one writer, the study's controller.

A writer that is killed in mid-append leaves a torn last line, and Optuna then fails to load the journal at all. So
the tail is repaired on opening: what was not written whole was not acknowledged to anybody either.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from hydro_slurm.errors import StudyError

logger = logging.getLogger(__name__)

JOURNAL_NAME = "optuna.journal"


def open_storage(directory: Path) -> JournalStorage:
    """Open (and repair) the journal in a study's directory."""
    path = directory / JOURNAL_NAME
    repair_torn_tail(path)
    return JournalStorage(JournalFileBackend(str(path)))


def repair_torn_tail(path: Path) -> int:
    """Cut a journal back to its last whole record.

    The removed bytes are kept beside it as `NAME.torn`.

    Returns:
        Number of bytes removed; 0 if the journal was whole or does not exist.

    Raises:
        StudyError: A record before the last one is damaged: that is no torn tail, and nothing is changed.
    """
    if not path.exists():
        return 0
    data = path.read_bytes()
    whole = _whole_length(data)
    if whole == len(data):
        return 0
    if b"\n" in data[whole:].rstrip(b"\n"):
        raise StudyError(
            f"{path} is damaged at byte {whole} of {len(data)}, and not only at its end; restore it from a backup"
        )
    with path.with_name(f"{path.name}.torn").open("ab") as kept:
        kept.write(data[whole:])
    with path.open("r+b") as file:
        file.truncate(whole)
    logger.warning("journal=%s: removed a torn record of %d bytes", path, len(data) - whole)
    return len(data) - whole


def _whole_length(data: bytes) -> int:
    """Length of the longest prefix that consists of whole records."""
    length = 0
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            json.loads(line)
        except ValueError:
            break
        length += len(line)
    return length


MAX_STARTUP_TRIALS = 24
"""Random trials before TPE begins: a bundle's worth, but not all of a study that fuses many."""


def make_sampler(name: str, seed: int, max_lanes: int) -> optuna.samplers.BaseSampler:
    """The sampler that a study names; those that can, spread their questions over a batch."""
    if name == "tpe":
        return optuna.samplers.TPESampler(
            seed=seed,
            constant_liar=True,
            n_startup_trials=min(max(10, max_lanes), MAX_STARTUP_TRIALS),
            multivariate=False,
        )
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    raise StudyError(f"sampler must be tpe or random, got {name!r}")


def make_pruner(name: str, rungs: tuple[int, ...]) -> optuna.pruners.BasePruner:
    """The pruner that a study names."""
    if name == "successive_halving":
        factor = (rungs[-1] / rungs[0]) ** (1 / max(len(rungs) - 1, 1))
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=rungs[0], reduction_factor=max(2, round(factor)))
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=rungs[0] - 1)
    if name == "none":
        return optuna.pruners.NopPruner()
    raise StudyError(f"pruner must be successive_halving, median or none, got {name!r}")
