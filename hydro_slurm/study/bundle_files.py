"""The controller's side of a bundle's directory: it writes the spec and the inbox, and reads everything else."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from hydro_slurm import formats
from hydro_slurm.errors import FormatError
from hydro_slurm.model import BundleProgress, BundleSpec, InboxMessage, TrialResult

logger = logging.getLogger(__name__)


class BundleFiles:
    """One bundle's directory `bundles/ID`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._seen: set[str] = set()
        self.num_sent = len(list((directory / "inbox").glob("*.json"))) if directory.is_dir() else 0

    @classmethod
    def create(cls, directory: Path, spec: BundleSpec) -> BundleFiles:
        """Make the directory and write the spec."""
        for name in ("inbox", "results", "lanes"):
            (directory / name).mkdir(parents=True)
        formats.write_record(directory / "spec.json", spec)
        return cls(directory)

    def spec(self) -> BundleSpec:
        """What the bundle was started with."""
        return formats.read_record(BundleSpec, self.directory / "spec.json")

    def send(self, message: InboxMessage) -> None:
        """Leave a message in the inbox."""
        self.num_sent += 1
        formats.write_record(self.directory / "inbox" / f"{self.num_sent}.json", message)

    def new_results(self) -> list[TrialResult]:
        """Results that this object has not returned yet, each once. A damaged file is reported and skipped."""
        results = []
        for path in sorted((self.directory / "results").glob("[0-9]*.json")):
            if path.name in self._seen:
                continue
            try:
                results.append(formats.read_record(TrialResult, path))
            except OSError as error:
                logger.warning("bundle=%s: a result is tried again later: %s", self.directory.name, error)
                continue
            except FormatError as error:
                logger.error("bundle=%s: a result is left out: %s", self.directory.name, error)
            self._seen.add(path.name)
        return results

    def progress(self) -> BundleProgress | None:
        """The bundle's newest word about itself; None before its first."""
        try:
            return formats.read_record(BundleProgress, self.directory / "progress.json")
        except FileNotFoundError:
            return None
        except (FormatError, OSError) as error:
            logger.warning("bundle=%s: progress is left out: %s", self.directory.name, error)
            return None

    def checkpoints(self) -> dict[int, str]:
        """The newest complete checkpoint of each trial (they appear by renaming, so what is there is whole)."""
        return newest_checkpoints([self])


def _checkpoint_files(lanes: Path) -> Iterator[tuple[int, int, Path]]:
    for path in lanes.glob("*/step-*.pt"):
        trial, step = path.parent.name, path.stem.removeprefix("step-")
        if trial.isdigit() and step.isdigit():
            yield int(trial), int(step), path


def newest_checkpoints(bundles: Iterable[BundleFiles]) -> dict[int, str]:
    """The checkpoint with the most steps of each trial, over several bundles."""
    newest: dict[int, tuple[int, str]] = {}
    for bundle in bundles:
        for trial, step, path in _checkpoint_files(bundle.directory / "lanes"):
            if step >= newest.get(trial, (-1, ""))[0]:
                newest[trial] = (step, str(path))
    return {trial: path for trial, (_, path) in newest.items()}
