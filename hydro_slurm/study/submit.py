"""From a study file to a running study: its directory, and its Slurm job."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from hydro_slurm import formats
from hydro_slurm.clock import Clock, SystemClock
from hydro_slurm.model import Profile
from hydro_slurm.slurm import BatchRequest, SlurmClient
from hydro_slurm.study.data_plane import describe, run_verb
from hydro_slurm.study.description import (
    StudyRecord,
    StudySettings,
    create_study,
    file_sha256,
    recorded_environment,
    studies_dir,
)

logger = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 1_800.0
"""The coordinate check trains, which takes a while where the model is large."""


def prepare_study(
    file: Path,
    settings: StudySettings,
    *,
    name: str | None = None,
    trials: int | None = None,
    clock: Clock | None = None,
) -> Path:
    """Check a study file and create its study.

    Args:
        file: The study file.
        settings: How it is to run.
        name: Instead of the name in the file.
        trials: Instead of the number of trials in the file.

    Returns:
        The study's directory.

    Raises:
        StudyError: The file cannot be used, its model does not build, shrink or train a step, its surrogate would not
            transfer, or a study of that name exists.
    """
    file = file.absolute()
    description = describe(file)
    found = run_verb("check", file, timeout_s=CHECK_TIMEOUT_S)
    profile = formats.from_document(Profile, found["profile"], f"`check` of {file}")
    description = dataclasses.replace(description, width_scale=float(found["width_scale"]))
    for warning in found["warnings"]:
        logger.warning("%s: %s", file, warning)
    for kind, reason in profile.refused.items():
        if kind == "general":
            logger.warning("%s: %s", file, reason)
    if trials is not None:
        description = dataclasses.replace(description, trials=trials)
    record = StudyRecord(
        name=name or description.name,
        file=str(file),
        file_sha256=file_sha256(file),
        description=dataclasses.replace(description, name=name or description.name),
        settings=settings,
        created_at_s=(clock or SystemClock()).wall_s(),
        python=sys.executable,
        environment=recorded_environment(),
        knee_lanes=1 if "general" in profile.refused else profile.knee_lanes,
        throughput=tuple((point.lanes, point.lane_steps_per_s) for point in profile.points),
        separates=tuple(found["separates"]),
        lane_bytes=profile.lane_bytes,
        target_lane_bytes=_target_lane_bytes(profile, found["num_parameters"]),
    )
    directory = studies_dir() / record.name
    create_study(record, directory)
    formats.write_record(directory / "profiles" / f"{profile.key}.json", profile)
    return directory


def _target_lane_bytes(profile: Profile, num_parameters: dict[str, int]) -> int:
    """Memory of one lane on the target, estimated by the ratio of parameters."""
    return profile.lane_bytes * num_parameters["target"] // max(num_parameters["surrogate"], 1)


def submit_study(directory: Path, slurm: SlurmClient, sbatch_options: Sequence[str] = ()) -> int:
    """Submit the job that runs a prepared study's controller. Returns the job id at once."""
    return slurm.submit(
        BatchRequest(
            argv=[sys.executable, "-m", "hydro_slurm.cli.main", "study", "run", str(directory)],
            name=f"hydro:{directory.name}",
            comment=f"hydro:1 study={directory.name}",
            output=directory / "controller.log",
            extra_options=tuple(sbatch_options),
            requeue=True,
        )
    )
