"""What a study is: the description that its file gives, and the record that its directory keeps."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import optuna

from hydro_slurm import formats, model
from hydro_slurm.errors import StudyError

RECORD_NAME = "study.json"


@dataclass(frozen=True)
class StudyDescription:
    """What `python -m hydro_trials describe FILE --json` says: settings without code."""

    FORMAT: ClassVar[str] = "hydro.study-description"
    VERSION: ClassVar[int] = 1

    name: str
    space: dict[str, str]
    """Hyperparameter name to the JSON text of an Optuna distribution."""
    fixed: dict[str, Any]
    objective: str
    direction: Literal["minimize", "maximize"]
    trials: int
    steps: int
    rungs: tuple[int, ...]
    batch_size: int
    width_scale: float
    """S; 0 where it is "auto" and no check has decided yet."""
    max_lanes: int
    top_k: int
    seed: int
    sampler: str
    pruner: str
    optimizer: str
    schedule: str = "constant"

    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """The search space as Optuna's objects."""
        return {name: optuna.distributions.json_to_distribution(text) for name, text in self.space.items()}


@dataclass(frozen=True)
class StudySettings:
    """How a study runs on the cluster; options of `hydro study submit`, kept in `study.json`."""

    bundle_mem_mib: int = 1500
    """Memory that each bundle step asks for, in MiB."""
    poll_s: float = 1.0
    """Seconds between two cycles of the controller; they read files only."""
    slurm_poll_s: float = 15.0
    """Seconds between two questions to Slurm."""
    own_allocation: str = "when_no_host"
    """Whether bundles may run in the study's own job: never, when_no_host, always."""
    host_wait_s: float = 60.0
    """With when_no_host: how long no host job must have been seen."""
    checkpoint_every_s: float = 30.0
    timeline: bool = False
    """Record what each bundle computed and when."""

    def __post_init__(self) -> None:
        if self.own_allocation not in ("never", "when_no_host", "always"):
            raise StudyError(f"own_allocation must be never, when_no_host or always, got {self.own_allocation!r}")
        for name in ("bundle_mem_mib", "poll_s", "slurm_poll_s", "checkpoint_every_s"):
            if getattr(self, name) <= 0:
                raise StudyError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class StudyRecord:
    """`study.json`: everything that the controller needs, written once when the study is created."""

    FORMAT: ClassVar[str] = "hydro.study"
    VERSION: ClassVar[int] = 1

    name: str
    file: str
    """Absolute path of the study file; bundles import it."""
    file_sha256: str
    description: StudyDescription
    settings: StudySettings
    created_at_s: float
    python: str
    """The interpreter that bundles run under."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that the controller and its bundles are given."""
    knee_lanes: int = 0
    """The fusion count beyond which more lanes bring no throughput, as measured at submission; 0 if unknown."""
    throughput: tuple[tuple[float, ...], ...] = ()
    """Pairs of fusion count and surrogate lane steps per second, as measured at submission."""
    separates: tuple[str, ...] = ()
    """Hyperparameters in which the trials of a bundle must agree, as found at submission."""
    lane_bytes: int = 0
    """Memory that one more surrogate lane adds, in bytes; 0 if unknown."""
    target_lane_bytes: int = 0
    """The same of one lane on the target, estimated."""

    def check_file_unchanged(self) -> None:
        """Refuse to go on with a study file other than the one that was submitted.

        Raises:
            StudyError: The file is gone, or its contents differ.
        """
        if file_sha256(Path(self.file)) != self.file_sha256:
            raise StudyError(
                f"{self.file} has changed since study {self.name!r} was created; its trials would no longer be "
                "comparable: restore the file, or submit it under a new name (--name)"
            )


def file_sha256(path: Path) -> str:
    """Hash of a study file.

    Raises:
        StudyError: It cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise StudyError(f"cannot read the study file {path}: {error.strerror}") from None


def studies_dir() -> Path:
    """Where the user's studies live, one directory each."""
    return model.hydro_home() / "studies"


def study_dir(name_or_path: str) -> Path:
    """The directory of a study that exists, by its name or by the directory itself.

    Raises:
        StudyError: There is none.
    """
    for candidate in (studies_dir() / name_or_path, Path(name_or_path)):
        if (candidate / RECORD_NAME).is_file():
            return candidate.absolute()
    known = sorted(path.parent.name for path in studies_dir().glob(f"*/{RECORD_NAME}"))
    listing = ", ".join(known) if known else f"none in {studies_dir()}"
    raise StudyError(f"no study is called {name_or_path!r}; known: {listing}")


def read_study(directory: Path) -> StudyRecord:
    """Read a study's record."""
    return formats.read_record(StudyRecord, directory / RECORD_NAME)


def create_study(record: StudyRecord, directory: Path) -> None:
    """Make a study's directory and write its record.

    Raises:
        StudyError: A study of that name exists.
    """
    if not model.NAME_PATTERN.fullmatch(record.name):
        raise StudyError(
            f"a study cannot be called {record.name!r}: use letters, digits, '.', '_' and '-', at most 63, "
            "starting with a letter or digit"
        )
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir()
    except FileExistsError:
        raise StudyError(
            f"a study called {record.name!r} exists in {directory}; choose another --name, go on with it by "
            f"`hydro study run {record.name}`, or remove that directory"
        ) from None
    except OSError as error:
        raise StudyError(
            f"cannot create {error.filename}: {error.strerror}; set HYDRO_HOME to a shared folder"
        ) from None
    for part in ("bundles", "profiles"):
        (directory / part).mkdir()
    formats.write_record(directory / RECORD_NAME, record)


def recorded_environment() -> dict[str, str]:
    """The caller's variables that decide where studies, reports and gates are found."""
    wanted = ("HYDRO_HOME", "HYDRO_REPORT_DIR", "HYDRO_RUN")
    return {name: os.environ[name] for name in wanted if name in os.environ}
