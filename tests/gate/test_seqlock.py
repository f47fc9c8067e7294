"""No interleaving of a writer's and a reader's bytes yields a record that nobody wrote."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydro_slurm.clock import ManualClock
from hydro_slurm.gate import seqlock
from hydro_slurm.gate.layout import LEASE, OPEN, RECORD_OFFSET, SEQUENCE, SEQUENCE_OFFSET, WORD_OFFSET, word_of
from hydro_slurm.gate.reader import GateReader
from hydro_slurm.gate.writer import GateWriter

RECORD_BYTES = 12


def stores_of(
    records: list[bytes], first_sequence: int, shuffle: Callable[[list[int]], list[int]]
) -> Iterator[tuple[int, int]]:
    """The single-byte stores (offset, value) of a `SequencedWriter`, each system call's in any order."""
    calls: list[tuple[int, bytes]] = []

    class Recorder:
        @staticmethod
        def pwrite(_descriptor: int, data: bytes, offset: int) -> int:
            calls.append((offset, data))
            return len(data)

    original = seqlock.os
    seqlock.os = Recorder  # type: ignore[assignment]
    try:
        writer = seqlock.SequencedWriter(-1)
        writer._sequence = first_sequence
        for record in records:
            writer.write(record)
    finally:
        seqlock.os = original
    for offset, data in calls:
        for index in shuffle(list(range(len(data)))):
            yield offset + index, data[index]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), first_sequence=st.sampled_from([0, 2, 252, 254, 256, 65534, (1 << 32) - 2]))
def test_reader_never_returns_a_mixed_record(data: st.DataObject, first_sequence: int) -> None:
    records = [bytes([number]) * RECORD_BYTES for number in range(1, data.draw(st.integers(2, 6)))]
    memory = bytearray(RECORD_OFFSET + RECORD_BYTES)
    memory[SEQUENCE_OFFSET : SEQUENCE_OFFSET + SEQUENCE.size] = SEQUENCE.pack(first_sequence)

    def shuffle(order: list[int]) -> list[int]:
        return data.draw(st.permutations(order))

    stores = stores_of(records, first_sequence, shuffle)

    def let_writer_store(count: int) -> None:
        for _ in range(count):
            store = next(stores, None)
            if store is not None:
                memory[store[0]] = store[1]

    def read_at(num_bytes: int, offset: int) -> bytes:
        found = bytearray(num_bytes)
        let_writer_store(data.draw(st.integers(0, 30)))
        # The bytes of one copy may be loaded in any order, with the writer going on in between.
        breaks = data.draw(st.lists(st.integers(0, num_bytes - 1), max_size=3))
        for index in shuffle(list(range(num_bytes))):
            if index in breaks:
                let_writer_store(data.draw(st.integers(0, 25)))
            found[index] = memory[offset + index]
        return bytes(found)

    found = seqlock.read_sequenced(read_at, RECORD_BYTES)
    assert found is None or found in (bytes(RECORD_BYTES), *records)


def test_reader_gives_up_on_a_writer_that_died_in_mid_write() -> None:
    memory = bytearray(RECORD_OFFSET + RECORD_BYTES)
    memory[SEQUENCE_OFFSET] = 7
    calls: list[int] = []

    def read_at(num_bytes: int, offset: int) -> bytes:
        calls.append(offset)
        return bytes(memory[offset : offset + num_bytes])

    assert seqlock.read_sequenced(read_at, RECORD_BYTES) is None
    assert len(calls) == 3 * seqlock.READ_ATTEMPTS


@pytest.mark.parametrize("size", [0, SEQUENCE_OFFSET + 3, RECORD_OFFSET, RECORD_OFFSET + RECORD_BYTES - 1])
def test_short_page_is_an_end_of_file(size: int) -> None:
    memory = bytes(size)
    with pytest.raises(EOFError):
        seqlock.read_sequenced(lambda num_bytes, offset: memory[offset : offset + num_bytes], RECORD_BYTES)


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, 400), data=st.data())
def test_half_finished_open_is_never_a_wrong_lease(
    tmp_path_factory: pytest.TempPathFactory, cut: int, data: st.DataObject
) -> None:
    """Stop a host after any number of bytes of an `open`: readers see the old gate or the new one."""
    directory = tmp_path_factory.mktemp("torn") / "gate"
    clock = ManualClock()
    writer = GateWriter.create(directory, stage=0, num_stages=2, clock=clock)
    now = clock.monotonic_ns()
    old_deadline, new_deadline = (now + data.draw(st.integers(1, 10**10)) for _ in range(2))
    writer.open(old_deadline, iteration=1)
    if data.draw(st.booleans()):
        writer.close()
    before = (directory / "page").read_bytes()
    writer.open(new_deadline, iteration=2)
    after = (directory / "page").read_bytes()
    # The order of an `open`: odd sequence, record, even sequence, word.
    torn = bytearray(before)
    spans = [(SEQUENCE_OFFSET, SEQUENCE.pack(SEQUENCE.unpack_from(before, SEQUENCE_OFFSET)[0] + 1))]
    for offset, size in ((RECORD_OFFSET, LEASE.size), (SEQUENCE_OFFSET, SEQUENCE.size), (WORD_OFFSET, 16)):
        spans.append((offset, after[offset : offset + size]))
    stores = [(offset + index, byte) for offset, content in spans for index, byte in enumerate(content)]
    for offset, byte in stores[:cut]:
        torn[offset] = byte
    descriptor = os.open(directory / "page", os.O_WRONLY)
    os.pwrite(descriptor, torn, 0)
    os.close(descriptor)

    reader = GateReader.attach(directory, clock=clock)
    word_is_new = reader.words[WORD_OFFSET // 4] == word_of(2, OPEN)
    if reader.state() == "open":
        assert reader.until_ns - now <= max(old_deadline, new_deadline) - now
        snapshot = reader.snapshot()
        assert (snapshot.deadline_ns, snapshot.iteration) == ((new_deadline, 2) if word_is_new else (old_deadline, 1))
    reader.close()
    writer.leave()


def test_snapshots_under_a_writer_at_full_speed(
    gate_directory: Path, start_program: Callable[..., subprocess.Popen[str]]
) -> None:
    """Free memory, iteration and deadline of each lease are made from one number: a mixed record would show."""
    process = start_program("scribble.py", gate_directory)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    reader = GateReader.attach(gate_directory)
    seen = set()
    while len(seen) < 300:
        found = reader._examine()
        if found is not None and found.iteration:
            assert found.free_bytes == found.iteration * 3
            assert (found.deadline_ns - found.opened_at_ns) == found.open_for_ns
            seen.add(found.iteration)
    process.stdin.close()
    assert process.wait(20) == 0
