"""The layout: fixed offsets, and the same in C."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hydro_slurm.clock import ManualClock
from hydro_slurm.gate import layout
from hydro_slurm.gate.bundle_page import BundlePage
from hydro_slurm.gate.reader import GateReader
from hydro_slurm.gate.writer import GateWriter


@pytest.mark.parametrize("fields", [layout.LEASE_FIELDS, layout.BUNDLE_FIELDS])
def test_fields_are_naturally_aligned_and_on_the_page(fields: tuple[layout.Field, ...]) -> None:
    sizes = {"uint32_t": 4, "int32_t": 4, "uint64_t": 8, "int64_t": 8}
    end = layout.RECORD_OFFSET
    for field, offset in zip(fields, layout.offsets(fields).values(), strict=True):
        assert offset == end
        assert offset % sizes[field.c_type] == 0
        end += sizes[field.c_type]
    assert layout.record_struct(fields).size == end - layout.RECORD_OFFSET
    assert end <= layout.PAGE_BYTES


def test_offsets_that_other_versions_rely_on() -> None:
    """Change these and `VERSION` together."""
    assert layout.VERSION == 1
    assert (layout.WORD_OFFSET, layout.HEARTBEAT_OFFSET) == (64, 72)
    assert (layout.SEQUENCE_OFFSET, layout.RECORD_OFFSET) == (128, 136)
    assert layout.offsets(layout.LEASE_FIELDS)["deadline_ns"] == 152
    assert layout.offsets(layout.BUNDLE_FIELDS)["quantum_p99_ns"] == 152
    assert layout.word_of(5, layout.OPEN) == 21
    assert layout.word_of((1 << 30) + 1, layout.GONE) == 6


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler (gcc) on this machine")
def test_c_header_compiles_and_reads_the_same(gate_directory: Path, tmp_path: Path) -> None:
    header = subprocess.run(
        [sys.executable, "-m", "hydro_slurm.gate.layout", "--c-header"], capture_output=True, text=True, check=True
    ).stdout
    (tmp_path / "gate.h").write_text(header)
    program = tmp_path / "print"
    source = Path(__file__).parent / "programs" / "print_page.c"
    options = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-I", tmp_path]
    subprocess.run(["gcc", *options, "-o", program, source], check=True)
    clock = ManualClock()
    with GateWriter.create(gate_directory, stage=1, num_stages=4, clock=clock) as writer:
        writer.open(clock.monotonic_ns() + 5_000_000, iteration=77, free_bytes=3 << 33)
        bundle = BundlePage.create(gate_directory, "b1", clock=clock)
        bundle.state, bundle.num_lanes, bundle.quantum_p99_ns, bundle.compute_ns = layout.PAUSED, 9, -7, 1 << 40
        bundle.acknowledged_word = writer.word
        bundle.publish()
        gate = GateReader.attach(gate_directory, clock=clock).snapshot()
        printed = subprocess.run(
            [program, gate_directory / "page", gate_directory / "bundles" / "b1"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
    expected = (gate.word, gate.word, gate.heartbeat_ns, gate.opened_at_ns, gate.deadline_ns, gate.free_bytes)
    expected += (gate.iteration, gate.stage, gate.num_stages, gate.pid, gate.start_ticks)
    assert [int(number) for number in printed[0].split()] == list(expected)
    assert [int(number) for number in printed[1].split()] == [1, 9, -7, 1 << 40, 1, 1]
    assert (gate.iteration, gate.stage, gate.num_stages, gate.free_bytes) == (77, 1, 4, 3 << 33)


def test_layout_module_explains_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hydro_slurm.gate.layout"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "--c-header" in done.stderr
