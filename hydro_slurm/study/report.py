"""What a study tells the world: `status.json` while it runs, `summary.json` at its end."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Optional

from hydro_slurm import formats
from hydro_slurm.study.description import StudyRecord
from hydro_slurm.study.search import Search
from hydro_slurm.study.verification import Verification, VerifiedTrial
from hydro_slurm.study.winner import winner_code

STATUS_NAME, SUMMARY_NAME = "status.json", "summary.json"


@dataclass(frozen=True)
class StudyStatus:
    """Where a study stands; replaced by its controller in every cycle."""

    FORMAT: ClassVar[str] = "hydro.study-status"
    VERSION: ClassVar[int] = 1

    name: str
    phase: str
    """search, verify, finished, stopped, or failed (the sentence says why)."""
    job_id: int
    counts: dict[str, int]
    bundles: list[str]
    sentence: str
    written_at_s: float


@dataclass(frozen=True)
class BestTrial:
    """The search's best configuration by the surrogate's value."""

    trial: int
    params: dict[str, Any]
    value: Optional[float]


@dataclass(frozen=True)
class StudySummary:
    """The outcome of a study."""

    FORMAT: ClassVar[str] = "hydro.study-summary"
    VERSION: ClassVar[int] = 1

    name: str
    objective: str
    direction: str
    width_scale: float
    counts: dict[str, int]
    best: Optional[BestTrial]
    """Best on the surrogate; null if no trial is COMPLETE."""
    verified: list[VerifiedTrial]
    """The best configurations on the target model, the winner first."""
    code: str = ""
    """Python that makes the winner's optimizer and schedule for the user's own model."""


def write_status(directory: Path, status: StudyStatus) -> None:
    """Replace `status.json`."""
    formats.write_record(directory / STATUS_NAME, status)


def read_status(directory: Path) -> StudyStatus | None:
    """The newest status; None before the controller's first cycle."""
    try:
        return formats.read_record(StudyStatus, directory / STATUS_NAME)
    except FileNotFoundError:
        return None


def write_summary(
    directory: Path, record: StudyRecord, search: Search, verification: Verification | None
) -> StudySummary:
    """Write `summary.json` from what the search and the verification know."""
    top = search.top(1)
    verified = verification.results(record.description.direction) if verification else []
    summary = StudySummary(
        name=record.name,
        objective=record.description.objective,
        direction=record.description.direction,
        width_scale=record.description.width_scale,
        counts=search.counts(),
        best=BestTrial(top[0].number, dict(top[0].params), top[0].value) if top else None,
        verified=verified,
        code=_code(record, verified[0].params if verified else top[0].params) if top else "",
    )
    formats.write_record(directory / SUMMARY_NAME, summary)
    return summary


def read_summary(directory: Path) -> StudySummary | None:
    """The outcome; None while the study has none."""
    try:
        return formats.read_record(StudySummary, directory / SUMMARY_NAME)
    except FileNotFoundError:
        return None


def describe_text(summary: StudySummary) -> str:
    """The outcome as a few lines for a terminal."""
    counts = "  ".join(f"{state} {count}" for state, count in summary.counts.items() if count)
    lines = [f"study {summary.name}: {counts}"]
    if summary.best:
        lines.append(f"  best on the surrogate (S={summary.width_scale:g}): {_configuration(summary.best)}")
    for rank, found in enumerate(summary.verified, 1):
        value = "-" if found.target_value is None else f"{found.target_value:.5g}"
        lines.append(
            f"  verified {rank}: trial {found.trial} {summary.objective}={value} on the target "
            f"({found.surrogate_value:.5g} on the surrogate) {_params(found.params)} {found.state}"
        )
    if summary.code:
        lines += ["  the winner, for your own model:", *(f"    {line}" for line in summary.code.splitlines())]
    return "\n".join(lines)


def _code(record: StudyRecord, params: dict[str, Any]) -> str:
    of = record.description
    return winner_code(of.optimizer, of.schedule, of.fixed, params, steps=of.steps, batch_size=of.batch_size)


def _configuration(best: BestTrial) -> str:
    value = "-" if best.value is None else f"{best.value:.5g}"
    return f"trial {best.trial}, {value}, {_params(best.params)}"


def _params(params: dict[str, Any]) -> str:
    return " ".join(f"{name}={v:.4g}" if isinstance(v, float) else f"{name}={v}" for name, v in params.items())


def as_plain(record: Any) -> dict[str, Any]:
    """A record as plain data for `--json`."""
    return dict(dataclasses.asdict(record))
