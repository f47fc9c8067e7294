"""One record that one process writes and others read without ever waiting for each other.

The writer makes the sequence odd, writes the record, makes the sequence even. A reader that saw the same even sequence
before and after its copy has a copy of one record and not of two.

Both sides go through the file (pwrite, pread) and not through a mapping: a file that shrinks under a mapping kills who
touches it by SIGBUS, and here it only reads short. The system calls also order the accesses on machines with weakly
ordered memory, which plain stores made from Python would not. Standard library only, Python 3.9.
"""

from __future__ import annotations

import os
from typing import Callable, Optional

from hydro_slurm.gate.layout import RECORD_OFFSET, SEQUENCE, SEQUENCE_OFFSET

ReadAt = Callable[[int, int], bytes]
"""Reads (number of bytes, offset); short at the end of the file."""

READ_ATTEMPTS = 8


class SequencedWriter:
    """The only writer of one record."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._sequence = 0

    def write(self, record: bytes) -> None:
        """Publish a record; costs three system calls, waits for nobody."""
        sequence = self._sequence
        descriptor = self._descriptor
        os.pwrite(descriptor, SEQUENCE.pack(sequence + 1), SEQUENCE_OFFSET)
        os.pwrite(descriptor, record, RECORD_OFFSET)
        os.pwrite(descriptor, SEQUENCE.pack(sequence + 2), SEQUENCE_OFFSET)
        self._sequence = sequence + 2


def read_page(descriptor: int, record_bytes: int) -> tuple[bytes, Optional[bytes]]:
    """What lies before the record, read by the same system call as it; and the record (None as in `read_sequenced`).

    Raises:
        EOFError: The file is shorter than a page has to be.
        OSError: It cannot be read.
    """
    page = b""

    def read_at(num_bytes: int, offset: int) -> bytes:
        nonlocal page
        if offset != RECORD_OFFSET:
            return os.pread(descriptor, num_bytes, offset)
        page = os.pread(descriptor, RECORD_OFFSET + num_bytes, 0)
        return page[RECORD_OFFSET:]

    record = read_sequenced(read_at, record_bytes)
    return page, record


def read_sequenced(read_at: ReadAt, num_bytes: int) -> Optional[bytes]:
    """A whole record, or None where each attempt met a write in progress.

    Raises:
        EOFError: The file is shorter than a page has to be.
    """
    for _ in range(READ_ATTEMPTS):
        before = read_at(SEQUENCE.size, SEQUENCE_OFFSET)
        record = read_at(num_bytes, RECORD_OFFSET)
        after = read_at(SEQUENCE.size, SEQUENCE_OFFSET)
        if len(before) != SEQUENCE.size or len(record) != num_bytes or len(after) != SEQUENCE.size:
            raise EOFError(f"the page ends before byte {RECORD_OFFSET + num_bytes}")
        if before == after and not before[0] & 1:
            return record
    return None
