"""Checkpoints of single lanes: `lanes/TRIAL/step-N.pt`, whole or not there, the newest two of each trial."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hydro_slurm.errors import FormatError
from hydro_slurm.model import LaneSpec
from hydro_trials.fusion import LaneState

FORMAT, VERSION = "hydro.checkpoint", 1
NUM_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """One lane at one step."""

    trial: int
    width_scale: float
    lane_seconds: float
    state: LaneState


def write_checkpoint(lanes: Path, checkpoint: Checkpoint) -> Path:
    """Write to a temporary file, rename it, and remove all but the newest two of that trial."""
    directory = lanes / str(checkpoint.trial)
    directory.mkdir(parents=True, exist_ok=True)
    state = checkpoint.state
    document = {
        "format": FORMAT,
        "version": VERSION,
        "trial": checkpoint.trial,
        "width_scale": checkpoint.width_scale,
        "lane_seconds": checkpoint.lane_seconds,
        "step": state.step,
        "parameters": state.parameters,
        "buffers": state.buffers,
        "optimizer": state.optimizer,
    }
    path = directory / f"step-{state.step}.pt"
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".", delete=False) as file:
        temporary = Path(file.name)
        try:
            torch.save(document, file)
            file.flush()
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    for old in list_checkpoints(lanes, checkpoint.trial)[NUM_KEPT:]:
        with contextlib.suppress(OSError):
            old.unlink()
    return path


def list_checkpoints(lanes: Path, trial: int) -> list[Path]:
    """A trial's checkpoints, newest first."""
    found = [p for p in (lanes / str(trial)).glob("step-*.pt") if p.stem.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step-")), reverse=True)


def read_checkpoint(path: Path, trial: int, width_scale: float) -> Checkpoint:
    """Read a checkpoint of `trial` at `width_scale`. Loads tensors only, never code.

    Raises:
        FormatError: It is missing, damaged, or of another trial, width or version.
    """
    try:
        document: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its bytes happen to trip over
        raise FormatError(f"{path}: cannot be read as a checkpoint ({type(error).__name__}: {error})") from None
    found = (document.get("format"), document.get("version")) if isinstance(document, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise FormatError(f"{path}: got format {found[0]!r} version {found[1]!r}, needed {FORMAT!r} version {VERSION}")
    if (document["trial"], document["width_scale"]) != (trial, width_scale):
        raise FormatError(
            f"{path}: holds trial {document['trial']} at width scale {document['width_scale']:g}, "
            f"needed trial {trial} at {width_scale:g}"
        )
    state = LaneState(document["step"], document["parameters"], document["buffers"], document["optimizer"])
    return Checkpoint(trial, width_scale, float(document["lane_seconds"]), state)


def newest_checkpoint(
    lanes: Path, lane: LaneSpec, width_scale: float, on_bad: Callable[[int, FormatError], None]
) -> Checkpoint | None:
    """The furthest readable checkpoint of a lane: its own bundle's, or the one that it was handed over with.

    Args:
        lanes: The bundle's folder of checkpoints.
        lane: Whose.
        width_scale: S of the bundle.
        on_bad: Told of each one that cannot be read.
    """
    paths = list_checkpoints(lanes, lane.trial)
    if lane.checkpoint is not None and Path(lane.checkpoint) not in paths:
        paths.append(Path(lane.checkpoint))
    found: list[Checkpoint] = []
    for path in paths:
        try:
            found.append(read_checkpoint(path, lane.trial, width_scale))
        except FormatError as error:
            on_bad(lane.trial, error)
    return max(found, key=lambda checkpoint: checkpoint.state.step, default=None)
