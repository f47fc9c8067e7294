"""What a reader sees of what a host writes: leases, heartbeats, ends."""

from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydro_slurm.clock import ManualClock
from hydro_slurm.errors import GateError, GateGoneError
from hydro_slurm.gate.layout import GATE_MAGIC, GONE, PAGE_BYTES, RECORD_OFFSET, WORD_OFFSET, head_bytes
from hydro_slurm.gate.reader import WORD_INDEX, GateReader
from hydro_slurm.gate.writer import MAX_LEASE_NS, GateWriter

MS = 1_000_000
INT64_MAX = (1 << 63) - 1


ACTIONS = st.tuples(st.sampled_from(["open", "close", "bump", "beat"]), st.integers(-(10**9), 10**10), st.floats(0, 8))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def writer(gate_directory: Path, clock: ManualClock) -> GateWriter:
    return GateWriter.create(gate_directory, stage=1, num_stages=4, clock=clock)


@pytest.fixture
def reader(gate_directory: Path, writer: GateWriter, clock: ManualClock) -> GateReader:
    return GateReader.attach(gate_directory, clock=clock)


class TestLease:
    def test_new_gate_is_closed(self, reader: GateReader) -> None:
        assert reader.state() == "closed"
        assert not reader.may_run(0)

    def test_runs_what_ends_before_the_deadline(
        self, writer: GateWriter, reader: GateReader, clock: ManualClock
    ) -> None:
        writer.open(clock.monotonic_ns() + 50 * MS, iteration=12, free_bytes=1 << 40)
        assert reader.state() == "open"
        assert reader.may_run(50 * MS - 1)
        assert not reader.may_run(50 * MS), "a quantum that ends exactly at the deadline is too long"
        assert not reader.may_run(60 * MS)
        found = reader.snapshot()
        assert (found.state, found.iteration, found.free_bytes) == ("open", 12, 1 << 40)
        assert (found.stage, found.num_stages, found.pid) == (1, 4, os.getpid())
        assert found.deadline_ns - found.opened_at_ns == found.open_for_ns == 50 * MS

    def test_expires_with_no_message_from_anybody(
        self, writer: GateWriter, reader: GateReader, clock: ManualClock
    ) -> None:
        writer.open(clock.monotonic_ns() + 50 * MS)
        assert reader.may_run(0)
        clock.advance(0.05 - 1e-9)
        assert reader.may_run(0)
        clock.advance(1e-9)
        assert not reader.may_run(0), "now is the deadline"
        assert reader.state() == "closed"
        clock.advance(1000)
        assert not reader.may_run(0)

    def test_close_is_seen_at_the_next_look(self, writer: GateWriter, reader: GateReader, clock: ManualClock) -> None:
        writer.open(clock.monotonic_ns() + 50 * MS)
        assert reader.may_run(0)
        writer.close()
        assert not reader.may_run(0)

    def test_a_shorter_lease_replaces_a_longer_one(
        self, writer: GateWriter, reader: GateReader, clock: ManualClock
    ) -> None:
        writer.open(clock.monotonic_ns() + 50 * MS)
        assert reader.may_run(40 * MS)
        writer.close()
        writer.open(clock.monotonic_ns() + 5 * MS)
        assert not reader.may_run(40 * MS)
        assert reader.may_run(4 * MS)

    def test_a_lease_can_be_extended_while_it_runs(
        self, writer: GateWriter, reader: GateReader, clock: ManualClock
    ) -> None:
        writer.open(clock.monotonic_ns() + 5 * MS)
        assert not reader.may_run(9 * MS)
        writer.open(clock.monotonic_ns() + 10 * MS)
        assert reader.may_run(9 * MS)

    def test_bumping_the_epoch_closes(self, writer: GateWriter, reader: GateReader, clock: ManualClock) -> None:
        writer.open(clock.monotonic_ns() + 50 * MS)
        epoch = reader.snapshot().epoch
        writer.bump_epoch()
        assert not reader.may_run(0)
        assert reader.snapshot().epoch == epoch + 1

    @pytest.mark.parametrize("deadline_ns", [0, -1, -(1 << 70), 1_000_000_000])
    def test_no_or_past_deadline_is_closed(
        self, writer: GateWriter, reader: GateReader, clock: ManualClock, deadline_ns: int
    ) -> None:
        writer.open(clock.monotonic_ns() + 50 * MS)
        writer.open(deadline_ns)
        assert reader.state() == "closed"

    @pytest.mark.parametrize("deadline_ns", [INT64_MAX, INT64_MAX + 1, 1 << 200])
    def test_endless_leases_are_cut(
        self, writer: GateWriter, reader: GateReader, clock: ManualClock, deadline_ns: int
    ) -> None:
        writer.open(deadline_ns, iteration=INT64_MAX, free_bytes=-5)
        assert reader.snapshot().deadline_ns == clock.monotonic_ns() + MAX_LEASE_NS
        assert reader.may_run(MS)
        assert not reader.may_run(1 << 80)

    @settings(max_examples=100, deadline=None)
    @given(
        start_ns=st.integers(0, INT64_MAX // 2),
        steps=st.lists(ACTIONS, max_size=12),
        need_ns=st.integers(0, 10**9),
    )
    def test_whatever_the_host_does_nothing_runs_beyond_its_word(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        start_ns: int,
        steps: list[tuple[str, int, float]],
        need_ns: int,
    ) -> None:
        clock = ManualClock(monotonic_ns=start_ns)
        directory = tmp_path_factory.mktemp("gate") / "gate"
        with GateWriter.create(directory, stage=0, num_stages=2, clock=clock) as writer:
            reader = GateReader.attach(directory, clock=clock)
            deadline_ns, beat_ns = -1, start_ns
            for action, offset_ns, wait_s in steps:
                now = clock.monotonic_ns()
                if action == "open":
                    writer.open(now + offset_ns)
                    deadline_ns = now + offset_ns
                elif action == "beat":
                    writer.heartbeat(iteration=offset_ns)
                elif action == "close":
                    writer.close()
                    deadline_ns = -1
                else:
                    writer.bump_epoch()
                    deadline_ns = -1
                beat_ns = now
                clock.advance(wait_s)
                now = clock.monotonic_ns()
                allowed = now + need_ns < deadline_ns and now + need_ns < beat_ns + 5_000 * MS
                assert reader.may_run(need_ns) == allowed
            reader.close()


class TestHeartbeat:
    def test_stale_closes_and_fresh_reopens(self, writer: GateWriter, reader: GateReader, clock: ManualClock) -> None:
        writer.open(clock.monotonic_ns() + 30_000 * MS)
        for _ in range(3):
            clock.advance(4.9)
            assert reader.may_run(0)
            writer.heartbeat()
        clock.advance(5.1)
        assert not reader.may_run(0)
        assert reader.state() == "closed"
        writer.heartbeat()
        assert reader.may_run(0), "the lease still runs"

    def test_staleness_is_settable(self, gate_directory: Path, writer: GateWriter, clock: ManualClock) -> None:
        reader = GateReader.attach(gate_directory, clock=clock, stale_s=0.5)
        writer.open(clock.monotonic_ns() + 30_000 * MS)
        assert reader.may_run(499 * MS)
        assert not reader.may_run(500 * MS)

    def test_a_living_host_that_is_silent_is_gone_after_two_minutes(
        self, writer: GateWriter, reader: GateReader, clock: ManualClock
    ) -> None:
        clock.advance(119)
        assert reader.state() == "closed"
        clock.advance(2)
        assert reader.state() == "gone"
        writer.heartbeat()
        assert reader.state() == "gone", "gone stays"

    def test_a_dead_host_is_gone_once_its_heartbeat_is_stale(
        self,
        gate_directory: Path,
        start_program: Callable[..., subprocess.Popen[str]],
        eventually: Callable[[Callable[[], bool]], None],
    ) -> None:
        process = start_program("host.py", gate_directory)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        clock = ManualClock(monotonic_ns=time.monotonic_ns())
        reader = GateReader.attach(gate_directory, clock=clock)
        clock.advance(6)
        assert reader.state() == "closed", "alive, only silent"
        process.kill()
        process.wait()
        assert reader.state() == "gone"
        assert "has ended" in reader.gone_reason

    def test_another_process_with_the_number_of_the_host_is_not_the_host(
        self, gate_directory: Path, writer: GateWriter, clock: ManualClock
    ) -> None:
        page = gate_directory / "page"
        with page.open("r+b") as file:
            file.seek(RECORD_OFFSET + 64)
            file.write((12345).to_bytes(8, "little"))
        reader = GateReader.attach(gate_directory, clock=clock)
        assert reader.state() == "closed"
        clock.advance(6)
        assert reader.state() == "gone"


class TestEnd:
    def test_leaving_is_seen_and_tidies_up(self, gate_directory: Path, writer: GateWriter, reader: GateReader) -> None:
        writer.leave()
        writer.leave()
        assert reader.state() == "gone"
        assert not reader.may_run(0)
        assert not gate_directory.exists()
        with pytest.raises(GateGoneError):
            reader.snapshot()
        with pytest.raises(GateError, match="no gate at"):
            GateReader.attach(gate_directory)

    def test_a_forked_child_of_the_host_does_not_end_the_gate(self, writer: GateWriter, reader: GateReader) -> None:
        child = os.fork()
        if child == 0:
            writer.leave()
            del writer
            os._exit(0)
        os.waitpid(child, 0)
        assert reader.state() == "closed"

    def test_a_host_that_went_on_after_leaving_does_no_harm(self, writer: GateWriter, reader: GateReader) -> None:
        writer.leave()
        writer.open(1 << 62)
        writer.heartbeat(3)
        writer.close()
        assert reader.state() == "gone"

    @pytest.mark.parametrize("size", [0, 1, 15, WORD_OFFSET, WORD_OFFSET + 8, RECORD_OFFSET, RECORD_OFFSET + 71])
    def test_shrunk_page(
        self, gate_directory: Path, writer: GateWriter, reader: GateReader, clock: ManualClock, size: int
    ) -> None:
        writer.open(clock.monotonic_ns() + 50 * MS)
        assert reader.may_run(0)
        os.truncate(gate_directory / "page", size)
        clock.advance(0.05)
        assert not reader.may_run(0)
        assert reader.state() == "gone"
        writer.open(clock.monotonic_ns() + 50 * MS)
        writer.close()

    def test_the_host_survives_a_shrunk_page(self, gate_directory: Path, writer: GateWriter) -> None:
        os.truncate(gate_directory / "page", 0)
        writer.open(1 << 62, iteration=3)
        writer.heartbeat()
        writer.close()
        writer.leave()

    def test_deleted_page(self, gate_directory: Path, reader: GateReader) -> None:
        (gate_directory / "page").unlink()
        assert reader.state() == "gone"
        assert "deleted" in reader.gone_reason

    def test_page_deleted_in_an_open_gate(
        self, gate_directory: Path, writer: GateWriter, reader: GateReader, clock: ManualClock
    ) -> None:
        writer.open(clock.monotonic_ns() + 50 * MS)
        (gate_directory / "page").unlink()
        assert reader.may_run(0), "the host has said so"
        clock.advance(0.05)
        assert not reader.may_run(0)
        assert reader.gone_reason

    @settings(max_examples=200, deadline=None)
    @given(noise=st.binary(min_size=1, max_size=PAGE_BYTES), offset=st.integers(0, 220))
    def test_noise_never_crashes_and_the_lease_stays_bounded(
        self, tmp_path_factory: pytest.TempPathFactory, noise: bytes, offset: int
    ) -> None:
        clock = ManualClock()
        directory = tmp_path_factory.mktemp("noise") / "gate"
        writer = GateWriter.create(directory, stage=0, num_stages=2, clock=clock)
        writer.open(clock.monotonic_ns() + 50 * MS)
        reader = GateReader.attach(directory, clock=clock)
        descriptor = os.open(directory / "page", os.O_WRONLY)
        os.pwrite(descriptor, noise, offset)
        os.close(descriptor)
        assert reader.state() in ("closed", "open", "gone")
        assert not reader.may_run(7_000 * MS), "no noise keeps a gate open for longer than heartbeats allow"
        clock.advance(130)
        assert reader.state() == "gone"
        reader.close()
        writer.leave()

    def test_page_full_of_noise_is_gone(self, gate_directory: Path, writer: GateWriter, reader: GateReader) -> None:
        (gate_directory / "page").write_bytes(os.urandom(PAGE_BYTES))
        assert reader.state() == "gone"
        assert "not a gate's page" in reader.gone_reason

    def test_closed_reader_says_gone(self, reader: GateReader) -> None:
        reader.close()
        reader.close()
        assert not reader.may_run(0)
        assert reader.state() == "gone"


class TestFiles:
    def test_modes_are_the_documented_ones_whatever_the_umask(self, gate_directory: Path) -> None:
        old = os.umask(0o077)
        try:
            writer = GateWriter.create(gate_directory, stage=0, num_stages=2)
        finally:
            os.umask(old)
        with writer:
            assert stat.S_IMODE((gate_directory / "page").stat().st_mode) == 0o644
            for directory in (gate_directory / "bundles", gate_directory, gate_directory.parent):
                assert stat.S_IMODE(directory.stat().st_mode) == 0o755
            assert sorted(path.name for path in gate_directory.iterdir()) == ["bundles", "page"]

    def test_a_stale_page_is_replaced_and_its_readers_are_sent_away(
        self, gate_directory: Path, start_program: Callable[..., subprocess.Popen[str]]
    ) -> None:
        process = start_program("host.py", gate_directory)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(GateError, match=f"belongs to live process {process.pid}"):
            GateWriter.create(gate_directory, stage=0, num_stages=2)
        old_reader = GateReader.attach(gate_directory)
        process.kill()
        process.wait()
        with GateWriter.create(gate_directory, stage=0, num_stages=2) as writer:
            assert old_reader.words[WORD_INDEX] & 3 == GONE
            assert old_reader.state() == "gone"
            writer.open(time.monotonic_ns() + 10**10)
            assert GateReader.attach(gate_directory).may_run(MS)

    def test_a_directory_that_others_may_change_is_refused(self, gate_directory: Path) -> None:
        gate_directory.mkdir(parents=True)
        gate_directory.parent.chmod(0o777)
        with pytest.raises(GateError, match="can be changed by others"):
            GateWriter.create(gate_directory, stage=0, num_stages=2)
        gate_directory.parent.chmod(0o1777)
        GateWriter.create(gate_directory, stage=0, num_stages=2).leave()

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make another user's directory")
    def test_another_users_directory_is_refused(self, gate_directory: Path) -> None:
        gate_directory.mkdir(parents=True)
        os.chown(gate_directory.parent, 65534, 65534)
        with pytest.raises(GateError, match="belongs to uid 65534"):
            GateWriter.create(gate_directory, stage=0, num_stages=2)

    def test_unwritable_place_is_one_clear_line(self) -> None:
        with pytest.raises(GateError, match="HYDRO_RUN"):
            GateWriter.create(Path("/proc/hydro/gate"), stage=0, num_stages=2)

    @pytest.mark.parametrize("kind", ["link", "fifo", "directory", "empty", "other version"])
    def test_what_is_no_page_is_refused_at_once(self, gate_directory: Path, kind: str) -> None:
        gate_directory.mkdir(parents=True)
        page = gate_directory / "page"
        if kind == "link":
            (gate_directory / "elsewhere").write_bytes(head_bytes(GATE_MAGIC).ljust(PAGE_BYTES, b"\0"))
            page.symlink_to("elsewhere")
        elif kind == "fifo":
            os.mkfifo(page)
        elif kind == "directory":
            page.mkdir()
        elif kind == "empty":
            page.touch()
        else:
            page.write_bytes((GATE_MAGIC + b"\2\0\0\0\0\x10\0\0").ljust(PAGE_BYTES, b"\0"))
        with pytest.raises(GateError):
            GateReader.attach(gate_directory)
