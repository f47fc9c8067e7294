"""A bundle's own page, `bundles/ID` beside its gate: how far it has heard the host, and how it does.

Written by the bundle, read by its supervisor and by the host, who believe none of it: it decides only how soon the
supervisor becomes impatient. Standard library only, Python 3.9.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from hydro_slurm.clock import Clock, SystemClock
from hydro_slurm.errors import GateError, GateGoneError
from hydro_slurm.gate.layout import (
    BUNDLE,
    BUNDLE_MAGIC,
    BUNDLES_NAME,
    HEAD,
    LEAVING,
    PAGE_NAME,
    UNDIVIDED,
    WORD_AND_HEARTBEAT,
    WORD_OFFSET,
    head_bytes,
    require_little_endian,
)
from hydro_slurm.gate.page_file import create_page, names_this
from hydro_slurm.gate.process import start_ticks
from hydro_slurm.gate.seqlock import SequencedWriter, read_page
from hydro_slurm.model import NAME_PATTERN


@dataclass(frozen=True)
class BundleSnapshot:
    """What a bundle says of itself."""

    state: int
    """UNDIVIDED, RUNNING, PAUSED or LEAVING of `layout`."""
    acknowledged_word: int
    heartbeat_ns: int
    pid: int
    num_lanes: int
    start_ticks: int
    quantum_p99_ns: int
    overruns: int
    num_quanta: int
    compute_ns: int


class BundlePage:
    """The bundle's side: set the attributes, then `publish` (four system calls) or `publish_state` (one)."""

    def __init__(self, path: Path, descriptor: int, clock: Clock) -> None:
        self.path = path
        self.state = UNDIVIDED
        self.acknowledged_word = self.num_lanes = self.quantum_p99_ns = 0
        self.overruns = self.num_quanta = self.compute_ns = 0
        self._pid, self._start_ticks = os.getpid(), start_ticks(os.getpid())
        self._descriptor = descriptor
        self._now_ns = clock.monotonic_ns
        self._record = SequencedWriter(descriptor)
        self.publish()

    @classmethod
    def create(cls, gate_directory: Path, bundle_id: str, *, clock: Optional[Clock] = None) -> BundlePage:
        """Make the page of the calling process, in place of one that an earlier process of this bundle left.

        Raises:
            GateError: The name cannot be a file's, or the directory is not there or not writable.
        """
        require_little_endian()
        path = _path_of(gate_directory, bundle_id)
        try:
            descriptor = create_page(path, BUNDLE_MAGIC, b"")
        except OSError as error:
            raise GateError(f"cannot create the bundle's page {path}: {error.strerror}") from None
        return cls(path, descriptor, clock or SystemClock())

    @staticmethod
    def attach(gate_directory: Path, bundle_id: str) -> BundlePageReader:
        """Read another process's page.

        Raises:
            GateError: There is none (yet), or it may not be read.
        """
        return BundlePageReader(_path_of(gate_directory, bundle_id))

    def publish(self) -> None:
        """Write what the attributes say, with a fresh heartbeat."""
        record = BUNDLE.pack(
            self._pid,
            self.num_lanes,
            self._start_ticks,
            self.quantum_p99_ns,
            self.overruns,
            self.num_quanta,
            self.compute_ns,
        )
        self._record.write(record)
        self.publish_state()

    def publish_state(self) -> None:
        """Write `state` and `acknowledged_word`, with a fresh heartbeat."""
        words = WORD_AND_HEARTBEAT.pack(self.state, self.acknowledged_word, self._now_ns())
        os.pwrite(self._descriptor, words, WORD_OFFSET)

    def close(self) -> None:
        """Say LEAVING and remove the page; the descriptor goes with the object."""
        if self._pid != os.getpid():
            return
        self.state = LEAVING
        with contextlib.suppress(OSError):
            self.publish()
            if names_this(self.path, self._descriptor):
                self.path.unlink()
            if not (self.path.parent.parent / PAGE_NAME).exists():
                # The host has left before its bundles: the last one tidies up. Fails where anybody else still is.
                self.path.parent.rmdir()
                self.path.parent.parent.rmdir()

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._descriptor)


class BundlePageReader:
    """Reads one bundle's page; it may be replaced or vanish at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            raise GateError(f"no bundle's page at {path}") from None
        except OSError as error:
            raise GateError(f"cannot read the bundle's page {path}: {error.strerror}") from None

    def snapshot(self) -> Optional[BundleSnapshot]:
        """What the page says, or None while its writer is in the middle of it.

        Raises:
            GateGoneError: The page was deleted, replaced, shrunk or overwritten.
        """
        descriptor = self._descriptor
        try:
            if os.fstat(descriptor).st_nlink == 0:
                raise GateGoneError(f"{self.path} has been deleted")
            page, record = read_page(descriptor, BUNDLE.size)
        except (OSError, EOFError) as error:
            raise GateGoneError(f"{self.path} is no longer a bundle's page: {error}") from None
        if page[: HEAD.size] != head_bytes(BUNDLE_MAGIC):
            raise GateGoneError(f"{self.path} is not a bundle's page of this version of hydro_slurm")
        if record is None:
            return None
        return BundleSnapshot(*WORD_AND_HEARTBEAT.unpack_from(page, WORD_OFFSET), *BUNDLE.unpack(record))

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _path_of(gate_directory: Path, bundle_id: str) -> Path:
    if not NAME_PATTERN.fullmatch(bundle_id):
        raise GateError(f"{bundle_id!r} cannot be a bundle's name; use letters, digits, dots, dashes and underscores")
    return Path(gate_directory) / BUNDLES_NAME / bundle_id
