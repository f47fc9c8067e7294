"""Eager transfer: the best configuration so far starts on the target before the search is over."""

from __future__ import annotations

from dataclasses import dataclass

from hydro_slurm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Candidate:
    """A trial and its value on the surrogate; smaller is better."""

    trial: int
    value: float


@dataclass(frozen=True, slots=True)
class Supersede:
    """Start a trial on the target; stop another there, if there is one."""

    start: int
    stop: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferPolicy:
    """When the best so far is transferred."""

    min_share_done: float = 0.5
    """Share of the trials that must have ended."""
    max_progress: float = 0.5
    """A transfer that is further than this share of its training is not given up for a better trial: that one is
    verified beside it, at the end."""

    def __post_init__(self) -> None:
        for name in ("min_share_done", "max_progress"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"transfer.{name} must lie in [0, 1], got {getattr(self, name)}")


def eager_transfer(
    num_ended: int,
    num_trials: int,
    best: Candidate | None,
    on_target: Candidate | None,
    progress: float,
    exclusive_slot_idle: bool,
    policy: TransferPolicy,
) -> Supersede | None:
    """Decide whether a trial starts on the target now.

    Args:
        num_ended: Trials of the search that have ended.
        num_trials: All trials of the search.
        best: The best COMPLETE trial so far.
        on_target: What runs on the target already.
        progress: How far that is, from 0 to 1.
        exclusive_slot_idle: Whether an exclusive device has nothing to do.
        policy: The thresholds.
    """
    if best is None or num_ended < policy.min_share_done * num_trials:
        return None
    if on_target is None:
        return Supersede(best.trial) if exclusive_slot_idle else None
    if best.value < on_target.value and progress < policy.max_progress:
        return Supersede(best.trial, on_target.trial)
    return None
