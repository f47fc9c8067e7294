"""Profiles: throughput and memory by fusion count, as `python -m hydro_trials profile` writes them."""

from __future__ import annotations

from pathlib import Path

from hydro_sim.settings import StudyConfig
from hydro_slurm import formats
from hydro_slurm.errors import ConfigError, FormatError
from hydro_slurm.model import Profile
from hydro_slurm.policy import SizingPolicy, ThroughputCurve


def read_profile(path: Path) -> tuple[ThroughputCurve, int]:
    """Throughput curve and bytes per lane of a profile.

    Raises:
        FormatError: It cannot be read, or is no profile.
    """
    try:
        profile = formats.read_record(Profile, path)
        curve = ThroughputCurve(tuple((point.lanes, point.lane_steps_per_s) for point in profile.points))
    except OSError as error:
        raise FormatError(f"cannot read the profile {path}: {error.strerror}") from None
    except ConfigError as error:
        raise FormatError(f"{path}: not a profile: {error}") from None
    return curve, profile.lane_bytes


def sizing_of(config: StudyConfig, folder: Path) -> SizingPolicy:
    """What the policy knows of a study's bundles."""
    if config.profile:
        curve, lane_bytes = read_profile(folder / config.profile)
    else:
        curve, lane_bytes = ThroughputCurve(config.curve), 0
    if config.lane_mib:
        lane_bytes = round(config.lane_mib * (1 << 20))
    return SizingPolicy(max_lanes=config.max_lanes, lane_bytes=lane_bytes, curve=curve)


def target_sizing(config: StudyConfig) -> SizingPolicy:
    """What the policy knows of bundles on the target."""
    return SizingPolicy(max_lanes=config.target_curve[-1][0], curve=ThroughputCurve(config.target_curve))
