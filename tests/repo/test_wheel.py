"""What is installed: the wheel's contents, and where examples are found."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hydro_slurm.errors import HydroError
from hydro_slurm.examples import example_path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, built as pip builds it."""
    target = tmp_path_factory.mktemp("wheel")
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["-w", str(target), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl")
    return built


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_module_and_marks_them_as_typed(wheel: Path, root: Path) -> None:
    names = names_in(wheel)
    for folder in ("hydro_slurm", "trials/hydro_trials", "sim/hydro_sim"):
        base = (root / folder).parent
        expected = {str(path.relative_to(base)) for path in (root / folder).rglob("*.py")}
        assert expected
        assert expected <= names
        assert f"{Path(folder).name}/py.typed" in names


def test_wheel_holds_the_examples(wheel: Path, root: Path) -> None:
    expected = {f"hydro_trials/examples/{path.name}" for path in (root / "trials" / "examples").glob("*.py")}
    assert expected
    assert expected <= names_in(wheel)


def test_wheel_brings_nothing_else_to_the_top_level(wheel: Path) -> None:
    top = {name.split("/")[0] for name in names_in(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"hydro_slurm", "hydro_trials", "hydro_sim"}


def test_examples_are_found_in_the_checkout(root: Path) -> None:
    existing = sorted((root / "trials" / "examples").glob("*.py"))
    assert existing
    assert example_path(existing[0].stem) == existing[0]
    assert example_path(existing[0].name) == existing[0]


def test_examples_are_found_in_an_installed_wheel(wheel: Path, tmp_path: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    name = next((root / "trials" / "examples").glob("*.py")).stem
    script = "import sys; from hydro_slurm.examples import example_path; "
    script += f"print(example_path({name!r}), 'torch' in sys.modules)"
    done = subprocess.run(
        # -S leaves the editable install out.
        [sys.executable, "-S", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.stdout.split() == [str(tmp_path / "hydro_trials" / "examples" / f"{name}.py"), "False"], done.stderr


def test_unknown_example_is_refused_with_the_names_of_those_that_exist(root: Path) -> None:
    known = sorted(path.stem for path in (root / "trials" / "examples").glob("*.py"))
    with pytest.raises(HydroError, match="there are: .*" + known[0]):
        example_path("no_such_example")
