"""tools/setup.sh refuses in one line what it cannot install; the Makefile says what it can do."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

NOBODY = 65534


@pytest.fixture
def bare_checkout(root: Path) -> Iterator[Path]:
    """What set-up reads of a checkout, in a folder that an ordinary user owns."""
    with tempfile.TemporaryDirectory() as name:
        checkout = Path(name)
        (checkout / "tools").mkdir()
        shutil.copy(root / "tools" / "setup.sh", checkout / "tools")
        for file in ("pyproject.toml", "constraints.txt"):
            shutil.copy(root / file, checkout)
        checkout.chmod(0o755)
        if os.geteuid() == 0:
            for path in (checkout, *checkout.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
        yield checkout


def set_up(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it as an ordinary user."""
    user = NOBODY if os.geteuid() == 0 else None
    return subprocess.run(
        ["/bin/bash", "tools/setup.sh"],
        cwd=checkout,
        env={"PATH": "/usr/bin:/bin", "HOME": str(checkout)} | environment,
        user=user,
        group=user,
        extra_groups=[] if user else None,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_missing_packages_are_named_in_one_line_with_the_command(bare_checkout: Path) -> None:
    commands = bare_checkout / "bin"
    commands.mkdir()
    for path in (*Path("/usr/bin").iterdir(), *Path("/bin").iterdir()):
        if path.name not in {"srun", "ninja", "g++"} and not (commands / path.name).exists():
            (commands / path.name).symlink_to(path)
    done = set_up(bare_checkout, PATH=str(commands))
    if shutil.which("apt-get"):
        packages = "g++ ninja-build slurm-client"
        expected = f"run: sudo apt-get install --no-install-recommends {packages}"
        assert done.stderr == f"setup: missing packages: {packages}; {expected}\n"
    else:
        assert "slurm-client" in done.stderr
    assert done.returncode == 1
    assert not (bare_checkout / ".venv").exists()


def test_python_that_does_not_exist_is_refused(bare_checkout: Path) -> None:
    done = set_up(bare_checkout, PYTHON="python7.1")
    assert (done.returncode, done.stderr) == (1, "setup: PYTHON=python7.1 is no command\n")


def test_python_that_is_too_old_is_refused(bare_checkout: Path) -> None:
    # Python itself where its version is concerned; an old one is seldom installed.
    old = bare_checkout / "python3.9"
    old.write_text('#!/bin/sh\ncase "$*" in\n-V) echo Python 3.9.2;;\n*version_info*) exit 1;;\nesac\n')
    old.chmod(0o755)
    done = set_up(bare_checkout, PYTHON=str(old))
    assert done.returncode == 1
    assert f"{old} is Python 3.9.2, needed Python 3.11 or newer" in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_is_the_default_and_lists_every_target(root: Path) -> None:
    done = subprocess.run(["make"], cwd=root, capture_output=True, text=True, timeout=60, check=True)
    listed = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("make ")}
    makefile = (root / "Makefile").read_text()
    targets = {line.removeprefix(".PHONY: ") for line in makefile.splitlines() if line.startswith(".PHONY: ")}
    assert listed == targets >= {"setup", "demo", "test", "test-slow", "check", "bench", "clean", "distclean"}


def test_unknown_benchmark_is_refused(root: Path) -> None:
    done = subprocess.run(
        ["tools/bench.sh", "no_such_benchmark"], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("bench: no benchmark is called no_such_benchmark; there are:")
