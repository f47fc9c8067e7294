"""Trees below closed directories, such as a checkout in root's home, can be reached by every user of the cluster."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hydro_slurm.slurm import BatchRequest
from hydro_slurm.testbed import Testbed, TestbedSpec
from hydro_slurm.testbed.namespace import first_closed, follow

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs jobs as another user")
SCRIPT = '#!/bin/sh\ncat "$(dirname "$0")/data"\n'


@pytest.fixture
def closed(slurm_installed: None) -> Iterator[Path]:
    """A directory that only its owner may pass, with trees of all kinds below it."""
    top = Path(tempfile.mkdtemp(prefix="hydro-")).resolve()
    assert top.stat().st_mode & 0o777 == 0o700
    for name in ("plain/project", "shut", "outer/inner/venv"):
        (top / name).mkdir(parents=True)
        (top / name / "data").write_text(f"{name}\n")
        (top / name / "script").write_text(SCRIPT)
        (top / name / "script").chmod(0o755)
    (top / "shut" / "folder").mkdir()
    (top / "shut" / "link").symlink_to("data")
    (top / "shut").chmod(0o700)
    (top / "outer" / "inner").chmod(0o700)
    (top / "secret").write_text("secret\n")
    (top / "alias").symlink_to("plain/project")
    (top / "versions").mkdir()
    (top / "versions" / "current").symlink_to(top / "alias")
    yield top
    shutil.rmtree(top)


@needs_root
def test_an_ordinary_user_reaches_what_is_exposed_and_nothing_else(closed: Path) -> None:
    modes = {path: path.lstat().st_mode for path in [closed, *closed.rglob("*")]}
    exposed = (
        closed / "versions" / "current",
        closed / "shut",
        closed / "outer",
        closed / "outer" / "inner" / "venv",
        closed / "missing",
    )
    # The state of the testbed lies below the closed directory too.
    spec = TestbedSpec(nodes=2, base=closed / "t", expose=exposed)
    with Testbed.up(spec, ephemeral=True) as testbed:
        user = testbed.ordinary_user()

        def shown(path: str, node: str | None) -> str:
            return testbed.run([str(closed / path)], user=user, node=node).stdout

        for node in (None, "n1", "n2"):
            assert shown("plain/project/script", node) == "plain/project\n"
            assert shown("versions/current/script", node) == "plain/project\n"
            assert shown("shut/script", node) == "shut\n"
            assert shown("outer/inner/venv/script", node) == "outer/inner/venv\n"
            assert testbed.run(["cat", str(closed / "shut" / "link")], user=user, node=node).stdout == "shut\n"
            listed = testbed.run(["ls", str(closed)], user=user, node=node).stdout.split()
            assert sorted(listed) == ["alias", "outer", "plain", "shut", "t", "versions"]
        output = testbed.shared_dir / "homes" / user / "job.txt"
        client = testbed.client(user)
        argv = ["srun", str(closed / "versions" / "current" / "script")]
        job_id = client.submit(BatchRequest(argv=argv, nodes=2, output=output))
        assert client.wait_job(job_id, timeout_s=30.0) == "COMPLETED"
        assert output.read_text() == "plain/project\n" * 2
        # It is the real tree, not a copy of it.
        (closed / "plain" / "project" / "data").write_text("new\n")
        assert shown("plain/project/script", "n1") == "new\n"
    assert {path: path.lstat().st_mode for path in modes} == modes


@needs_root
def test_without_exposing_the_user_reaches_nothing(closed: Path) -> None:
    with Testbed.up(TestbedSpec(nodes=1, expose=()), ephemeral=True) as testbed:
        argv = [str(closed / "plain" / "project" / "script")]
        assert testbed.run(argv, user=testbed.ordinary_user(), check=False).returncode != 0


def test_symbolic_links_are_followed_one_by_one(tmp_path: Path) -> None:
    tmp_path = tmp_path.resolve()
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "relative").symlink_to("real/../real")
    (tmp_path / "absolute").symlink_to(tmp_path / "relative")
    links, end = follow(tmp_path / "absolute" / "deep" / "file")
    assert end == tmp_path / "real" / "deep" / "file"
    assert links == {
        tmp_path / "absolute": str(tmp_path / "relative"),
        tmp_path / "relative": "real/../real",
    }
    (tmp_path / "loop").symlink_to("loop")
    assert follow(tmp_path / "loop" / "x")[0] == {tmp_path / "loop": "loop"}


def test_the_topmost_closed_directory_is_found() -> None:
    with tempfile.TemporaryDirectory(prefix="hydro-") as name:
        _check_first_closed(Path(name).resolve())


def _check_first_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    inner = tmp_path / "a" / "b" / "c"
    inner.mkdir(parents=True)
    assert first_closed(inner) is None
    inner.chmod(0o711)
    assert first_closed(inner) == inner, "a tree that cannot be listed is closed as well"
    (tmp_path / "a" / "b").chmod(0o700)
    assert first_closed(inner) == tmp_path / "a" / "b"
    (tmp_path / "a").chmod(0o750)
    assert first_closed(inner) == tmp_path / "a"
