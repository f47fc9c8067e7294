"""Where each byte of a gate's page and of a bundle's page lies: the one source, for Python and for C.

Little-endian, fixed offsets, versioned. A page is 4096 bytes:

    offset 0    head: magic, version, page size; written once, before the page gets its name
    offset 64   word: epoch << 2 | state, 32 bits, on which readers wait by futex; with the heartbeat beside it,
                outside the seqlock, so that any thread of the host may beat
    offset 128  sequence (odd while the record is being written), then the record

`python -m hydro_slurm.gate.layout --c-header` prints the same as a C header. Standard library only, Python 3.9.
"""

from __future__ import annotations

import struct
import sys
from typing import NamedTuple

from hydro_slurm.errors import GateError

PAGE_BYTES = 4096
VERSION = 1
GATE_MAGIC = b"HYDROGAT"
BUNDLE_MAGIC = b"HYDROBUN"
PAGE_NAME = "page"
BUNDLES_NAME = "bundles"

CLOSED, OPEN, GONE = 0, 1, 2
STATE_BITS = 2
STATE_MASK = 3
STATE_NAMES = {CLOSED: "closed", OPEN: "open", GONE: "gone"}
EPOCH_MASK = (1 << 30) - 1

UNDIVIDED, RUNNING, PAUSED, LEAVING = 0, 1, 2, 3
"""A bundle's states: busy with work that has no checks (start-up, a checkpoint), computing in quanta, waiting for
the gate, about to exit."""

WORD_OFFSET = 64
HEARTBEAT_OFFSET = 72
SEQUENCE_OFFSET = 128
RECORD_OFFSET = 136


class Field(NamedTuple):
    """One field of a record."""

    name: str
    c_type: str
    comment: str


_FORMATS = {"uint32_t": "I", "int32_t": "i", "uint64_t": "Q", "int64_t": "q"}

LEASE_FIELDS = (
    Field("lease_word", "uint32_t", "the word that this record belongs to: another word has another lease"),
    Field("reserved_0", "uint32_t", "0"),
    Field("opened_at_ns", "int64_t", "CLOCK_MONOTONIC"),
    Field("deadline_ns", "int64_t", "CLOCK_MONOTONIC; the lease ends here with no message from anybody"),
    Field("open_for_ns", "int64_t", "length of the lease, for a device that can write a word but knows no clock"),
    Field("free_bytes", "uint64_t", "free memory on the slot's device"),
    Field("iteration", "int64_t", "the host's optimizer step"),
    Field("stage", "int32_t", "pipeline stage of the host rank"),
    Field("num_stages", "int32_t", "number of pipeline stages"),
    Field("pid", "int32_t", "the host rank"),
    Field("reserved_1", "uint32_t", "0"),
    Field("start_ticks", "uint64_t", "its start time: field 22 of /proc/PID/stat"),
)

BUNDLE_FIELDS = (
    Field("pid", "int32_t", "the bundle"),
    Field("state", "uint32_t", "0 undivided, 1 running, 2 paused, 3 leaving"),
    Field("acknowledged_word", "uint32_t", "the gate's word that the bundle last acted upon"),
    Field("num_lanes", "uint32_t", "fusion count"),
    Field("start_ticks", "uint64_t", "start time of the bundle: field 22 of /proc/PID/stat"),
    Field("quantum_p99_ns", "int64_t", "99th percentile of recent quanta, the largest of all check sites"),
    Field("heartbeat_ns", "int64_t", "CLOCK_MONOTONIC"),
    Field("overruns", "uint64_t", "quanta that ended after their deadline"),
    Field("num_quanta", "uint64_t", "quanta since the start"),
    Field("compute_ns", "uint64_t", "time between resume and pause, since the start"),
)


def record_struct(fields: tuple[Field, ...]) -> struct.Struct:
    """The packer of a record: all fields naturally aligned, no padding."""
    return struct.Struct("<" + "".join(_FORMATS[field.c_type] for field in fields))


HEAD = struct.Struct("<8sII")
WORD = struct.Struct("<I")
WORD_AND_HEARTBEAT = struct.Struct("<IIq")
HEARTBEAT = struct.Struct("<q")
SEQUENCE = struct.Struct("<Q")
LEASE = record_struct(LEASE_FIELDS)
BUNDLE = record_struct(BUNDLE_FIELDS)


def word_of(epoch: int, state: int) -> int:
    """The 32-bit word of an epoch (which wraps at 2^30) and a state."""
    return (epoch & EPOCH_MASK) << STATE_BITS | state


def head_bytes(magic: bytes) -> bytes:
    """The first bytes of a page."""
    return HEAD.pack(magic, VERSION, PAGE_BYTES)


def require_little_endian() -> None:
    """Refuse a machine whose plain loads would read the word's bytes in another order."""
    if sys.byteorder != "little":
        raise GateError(f"gates need a little-endian machine, got a {sys.byteorder}-endian one")


def offsets(fields: tuple[Field, ...]) -> dict[str, int]:
    """The page offset of each field of a record."""
    found, position = {}, RECORD_OFFSET
    for field in fields:
        found[field.name] = position
        position += struct.calcsize(_FORMATS[field.c_type])
    return found
