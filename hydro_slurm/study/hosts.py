"""Which slots a study of this user can use now: running host jobs from Slurm, their slots from the report directory."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from hydro_slurm import formats
from hydro_slurm.clock import Clock
from hydro_slurm.errors import FormatError, SlurmError
from hydro_slurm.model import HOST_COMMENT, SlotReport
from hydro_slurm.slurm import Job, SlurmClient

logger = logging.getLogger(__name__)

REPORT_MAX_AGE_S = 120.0
"""A report that is older is its host's last word, not news; hosts replace theirs every 15 s."""

MAX_BACK_OFF_S = 60.0


@dataclass(frozen=True, slots=True)
class HostView:
    """What is known of the user's host jobs."""

    jobs: tuple[Job, ...]
    reports: tuple[SlotReport, ...]
    away: str = ""
    """Why Slurm could not be asked the last time; the rest is then what it said before."""


class HostWatch:
    """Asks Slurm politely (one command per poll, doubled pauses while it is away) and reads reports in between."""

    def __init__(self, slurm: SlurmClient, user: str, report_dir: Path, clock: Clock, poll_s: float) -> None:
        self._slurm, self._user, self._report_dir, self._clock = slurm, user, report_dir, clock
        self._poll_s = poll_s
        self._jobs: tuple[Job, ...] = ()
        self._away = ""
        self._num_failures = 0
        self._next_poll_s = 0.0
        self.last_seen_s = clock.wall_s()
        """When a host job was last seen, or the watch began."""

    def view(self) -> HostView:
        """The hosts and their slots, from Slurm if a poll is due."""
        now_s = self._clock.wall_s()
        if now_s >= self._next_poll_s:
            self._poll(now_s)
        return HostView(self._jobs, self._reports(now_s), self._away)

    def refresh(self) -> None:
        """Make the next `view` ask Slurm: something has happened that it knows more about."""
        if not self._away:
            self._next_poll_s = 0.0

    def _poll(self, now_s: float) -> None:
        try:
            jobs = self._slurm.jobs(user=self._user, states=("RUNNING",))
        except SlurmError as error:
            self._num_failures += 1
            self._away = str(error)
            self._next_poll_s = now_s + min(self._poll_s * 2.0 ** min(self._num_failures - 1, 8), MAX_BACK_OFF_S)
            return
        self._num_failures, self._away = 0, ""
        self._next_poll_s = now_s + self._poll_s
        self._jobs = tuple(job for job in jobs if HOST_COMMENT in job.comment.split())
        if self._jobs:
            self.last_seen_s = now_s

    def _reports(self, now_s: float) -> tuple[SlotReport, ...]:
        job_ids = {job.job_id for job in self._jobs}
        reports = []
        for path in sorted(self._report_dir.glob("[0-9]*.json")):
            number = path.name.partition(".")[0]
            if not number.isdigit() or int(number) not in job_ids:
                continue
            try:
                report = formats.read_record(SlotReport, path)
            except (FormatError, OSError) as error:
                logger.warning("slot report left out: %s", error)
                continue
            if now_s - report.written_at_s <= REPORT_MAX_AGE_S and report.job_id in job_ids:
                reports.append(report)
        return tuple(reports)
