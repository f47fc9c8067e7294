"""The bundle's side of its directory: it reads spec and inbox, and writes everything else."""

from __future__ import annotations

import json
import logging
from collections import deque
from pathlib import Path

from hydro_slurm import formats
from hydro_slurm.clock import Clock
from hydro_slurm.errors import FormatError
from hydro_slurm.model import ENDED_STATES, BundleProgress, BundleSpec, InboxMessage, TrialResult

logger = logging.getLogger(__name__)


class BundleDir:
    """One directory `bundles/ID`."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path, self._clock = path, clock
        self.lanes, self._inbox, self._results = path / "lanes", path / "inbox", path / "results"
        self.timeline = path / "timeline.jsonl"
        for directory in (self.lanes, self._inbox, self._results):
            directory.mkdir(exist_ok=True)
        self.last_inbox = 0
        self._unwritten: deque[TrialResult] = deque()

    @staticmethod
    def read_spec(path: Path) -> BundleSpec:
        """Read `spec.json`.

        Raises:
            FormatError: It is missing, or not a spec that can be run.
        """
        try:
            spec = formats.read_record(BundleSpec, path / "spec.json")
        except OSError as error:
            raise FormatError(f"{path / 'spec.json'}: {error.strerror}; a bundle directory holds one") from None
        rungs = spec.rungs
        if not rungs or list(rungs) != sorted(set(rungs)) or rungs[0] < 1:
            raise FormatError(f"{path}: spec.rungs: got {rungs}, needed rising numbers of steps")
        if spec.max_lanes < 1 or spec.width_scale < 1:
            raise FormatError(f"{path}: spec: max_lanes and width_scale must be 1 or more")
        if spec.slot.kind not in ("bubble", "own") or (spec.slot.kind == "bubble") != (spec.slot.gate_dir is not None):
            raise FormatError(
                f"{path}: spec.slot: got kind {spec.slot.kind!r} with gate_dir {spec.slot.gate_dir!r}, needed 'bubble' "
                "with a gate_dir, or 'own' without"
            )
        if spec.slot.device.kind != "cpu":
            raise FormatError(f"{path}: spec.slot.device: got {spec.slot.device.kind!r}; bundles train on 'cpu' so far")
        return spec

    def new_messages(self) -> list[InboxMessage]:
        """Messages that have come since the last call, in order. A damaged one is reported and passed over."""
        messages = []
        while (path := self._inbox / f"{self.last_inbox + 1}.json").exists():
            self.last_inbox += 1
            try:
                messages.append(formats.read_record(InboxMessage, path))
            except (FormatError, OSError) as error:
                logger.error("a message is left out: %s", error)
                self.event("bad_message", reason=str(error))
        return messages

    def has_ended(self, trial: int) -> bool:
        """Whether this bundle has written the trial's last result."""
        for path in self._results.glob(f"{trial}.*.json"):
            try:
                if formats.read_record(TrialResult, path).state in ENDED_STATES:
                    return True
            except (FormatError, OSError) as error:
                logger.error("a result is left out: %s", error)
        return False

    def write_result(self, result: TrialResult) -> None:
        """Write a result, after those that could not be written before; keep it if that fails now."""
        self._unwritten.append(result)
        self.retry_results()

    def retry_results(self) -> None:
        """Write what the disk refused earlier, in order."""
        while self._unwritten:
            result = self._unwritten[0]
            try:
                formats.write_record(self._results / f"{result.trial}.{result.rung}.json", result)
            except OSError as error:
                logger.error("%d results wait to be written: %s", len(self._unwritten), error)
                return
            self._unwritten.popleft()

    def write_progress(self, progress: BundleProgress) -> None:
        try:
            formats.write_record(self.path / "progress.json", progress)
        except OSError as error:
            logger.error("no progress written: %s", error)

    def event(self, event: str, **fields: object) -> None:
        """Append one line to `events.jsonl`."""
        line = json.dumps({"t_s": round(self._clock.wall_s(), 3), "event": event, **fields}, default=str)
        try:
            with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            logger.error("event lost: %s: %s", error, line)
