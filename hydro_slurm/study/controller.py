"""The controller of one study: the reconcile loop inside the study's own job, from the first trial to the report."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pwd
import signal
from pathlib import Path
from types import FrameType
from typing import TextIO

from hydro_slurm import model
from hydro_slurm.clock import Clock, SystemClock
from hydro_slurm.daemon import Reconciler
from hydro_slurm.errors import SlurmError, StudyError
from hydro_slurm.policy import Finish
from hydro_slurm.slurm import CommandLineClient, SlurmClient
from hydro_slurm.study.bundle_files import BundleFiles, newest_checkpoints
from hydro_slurm.study.description import StudyRecord, read_study
from hydro_slurm.study.hosts import HostWatch
from hydro_slurm.study.launching import BundleLauncher
from hydro_slurm.study.own_mode import OwnModeBackend
from hydro_slurm.study.report import StudyStatus, write_status, write_summary
from hydro_slurm.study.search import Search
from hydro_slurm.study.verification import FILE_NAME as VERIFIED_NAME
from hydro_slurm.study.verification import Verification, VerifiedTrial

logger = logging.getLogger(__name__)

LEAVE_GRACE_S = 20.0
"""How long bundles may take to checkpoint and leave when the controller is told to stop."""

STALE_WAIT_S = 60.0
"""How much longer a new controller waits for bundles of an earlier one."""


class StudyController:
    """Owns a study's storage and its bundles while it runs. One at a time per study (a lock file says so)."""

    def __init__(self, directory: Path, *, slurm: SlurmClient | None = None, clock: Clock | None = None) -> None:
        self.directory = directory
        self.record: StudyRecord = read_study(directory)
        self.record.check_file_unchanged()
        self.clock = clock or SystemClock()
        self._lock = _lock(directory)
        self.slurm = slurm or CommandLineClient()
        self.search = Search(self.record.description, directory, self.record.separates)
        self.verification: Verification | None = None
        self._hosts = HostWatch(
            self.slurm,
            pwd.getpwuid(os.getuid()).pw_name,
            model.slot_report_dir(),
            self.clock,
            self.record.settings.slurm_poll_s,
        )
        self.launcher = BundleLauncher(directory, self.record, self.slurm)
        self.backend = OwnModeBackend(directory, self.record, self._hosts, self.launcher, self.clock)
        self.backend.sources["search"] = self.search
        self.loop = Reconciler(self.backend, interval_s=self.record.settings.poll_s, clock=self.clock)
        self._stop_signal = 0

    @property
    def finished(self) -> bool:
        """Whether the study has its answer."""
        return self.verification is not None and self.verification.finished and not self.backend.bundles

    def run(self) -> int:
        """Run the study to its end, or until SIGTERM or SIGINT. Returns an exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            self._pick_up()
            self._after_cycle()
            self.loop.run(lambda: bool(self._stop_signal) or self.finished, self._after_cycle)
        except Exception as error:
            self.loop.last_sentence = f"{type(error).__name__}: {error}"
            self._leave()
            self._publish("failed")
            raise
        if self._stop_signal:
            self._leave()
            return 128 + self._stop_signal
        self._publish("finished")
        write_summary(self.directory, self.record, self.search, self.verification)
        return 0

    def _after_cycle(self) -> None:
        self._advance_phase()
        self._publish(self.phase)

    @property
    def phase(self) -> str:
        """search, verify, or finished."""
        if self.finished:
            return "finished"
        return "search" if self.verification is None else "verify"

    def _advance_phase(self) -> None:
        for bundle in self.backend.bundles:
            if self.backend.sources[bundle.purpose].finished:
                self.backend.finish(Finish(bundle.id, f"the {bundle.purpose} part of the study is done"))
        if self.verification is None and self.search.finished:
            self._begin_verification()

    def _begin_verification(self) -> None:
        top = self.search.top(self.record.description.top_k)
        if not self.search.top(1):
            logger.error("study=%s: no trial is COMPLETE, so there is nothing to verify", self.record.name)
        candidates = [
            VerifiedTrial(trial.number, dict(trial.params), float(trial.value or 0.0), None, model.RUNNING)
            for trial in top
        ]
        lanes = [self.search.lane(trial.number, trial.params) for trial in top]
        self.verification = Verification(self.directory / VERIFIED_NAME, candidates, lanes, self.record.separates)
        self.backend.sources["verify"] = self.verification

    def _pick_up(self) -> None:
        """Go on from what an earlier controller left: its results, its checkpoints, its steps."""
        earlier = sorted(path for path in (self.directory / "bundles").iterdir() if (path / "spec.json").exists())
        if not earlier:
            return
        num_cancelled = self._end_stale_steps()
        for purpose in ("search", "verify"):
            bundles = [files for files in map(BundleFiles, earlier) if files.spec().purpose == purpose]
            if bundles and purpose == "verify":
                self._begin_verification()
            source = self.search if purpose == "search" else self.verification
            for files in bundles:
                assert source is not None  # a bundle of this purpose ran, so the part had begun
                source.record(files.new_results())
            if source is not None:
                source.set_checkpoints(newest_checkpoints(bundles))
        logger.info(
            "study=%s goes on: %d bundles before, %d steps cancelled", self.record.name, len(earlier), num_cancelled
        )

    def _end_stale_steps(self) -> int:
        """Wait until no bundle of an earlier controller runs any more: two would train the same trials.

        Returns:
            How many there were.

        Raises:
            StudyError: Slurm does not answer, or they do not end.
        """
        deadline_s = self.clock.wall_s() + LEAVE_GRACE_S + STALE_WAIT_S
        count = 0
        while True:
            view = self._hosts.view()
            try:
                found = None if view.away else self.launcher.cancel_stale_steps([job.job_id for job in view.jobs])
            except SlurmError:
                found = None
            if found == 0:
                return count
            count = max(count, found or 0)
            if self.clock.wall_s() > deadline_s:
                raise StudyError(
                    f"bundles of an earlier controller of study {self.record.name!r} may still run "
                    f"({view.away or 'they do not end'}); run it again when Slurm answers"
                )
            self.clock.sleep(1.0)

    def _publish(self, phase: str) -> None:
        with contextlib.suppress(OSError):  # a full disk makes the study silent, it does not end it
            self._write_status(phase)

    def _write_status(self, phase: str) -> None:
        write_status(
            self.directory,
            StudyStatus(
                name=self.record.name,
                phase=phase,
                job_id=int(os.environ.get("SLURM_JOB_ID", "0")),
                counts=self.search.counts(),
                bundles=[f"{bundle.id}@{bundle.slot_id}" for bundle in self.backend.bundles],
                sentence=self.loop.last_sentence,
                written_at_s=self.clock.wall_s(),
            ),
        )

    def _leave(self) -> None:
        """Let every bundle checkpoint and leave; end those that do not."""
        logger.warning("study=%s stops, signal=%d", self.record.name, self._stop_signal)
        for bundle in self.backend.bundles:
            self.backend.finish(Finish(bundle.id, "the study's job is being stopped"))
        deadline_s = self.clock.wall_s() + LEAVE_GRACE_S
        while self.backend.bundles and self.clock.wall_s() < deadline_s:
            self.backend.read()
            self.clock.sleep(0.2)
        for bundle in self.backend.bundles:
            bundle.process.terminate()
        self._publish("stopped")

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._stop_signal = number


def _lock(directory: Path) -> TextIO:
    """Hold a study for this process. The lock goes with the process."""
    file = (directory / "controller.lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise StudyError(f"another controller runs this study: {directory / 'controller.lock'} is locked") from None
    return file
