"""tools/check_arrows.py finds what it is for, and nothing in this checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import check_arrows
import pytest


def make_tree(root: Path, **sources: str) -> Path:
    """A tree with a package of each kind, and modules by dotted name with `__` for the dot."""
    for folder in check_arrows.PACKAGES.values():
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").touch()
    for name, source in sources.items():
        package, *rest = name.split("__")
        path = root.joinpath(check_arrows.PACKAGES[package], *rest).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(source)
    return root


def test_this_checkout_keeps_the_arrows(root: Path) -> None:
    assert check_arrows.check(root) == []


def test_tree_without_packages_is_no_success(tmp_path: Path) -> None:
    assert check_arrows.check(tmp_path) != []


@pytest.mark.parametrize(
    ("module", "source", "fragment"),
    [
        ("hydro_slurm__gate__page", "from hydro_slurm.slurm import client", "gate may import"),
        ("hydro_slurm__gate__page", "def f():\n    import hydro_slurm.study", "gate may import"),
        ("hydro_slurm__gate__page", "from ..policy import place", "gate may import"),
        ("hydro_slurm__gate__page", "from hydro_slurm import policy", "gate may import"),
        ("hydro_slurm__gate__page", "import numpy", "host's environment"),
        ("hydro_slurm__gate__page", "def f():\n    import torch", "host's environment"),
        ("hydro_slurm__hooks__hook", "import torch", "host's environment"),
        ("hydro_slurm__policy__place", "import hydro_slurm.daemon", "policy may import"),
        ("hydro_slurm__study__run", "import torch", "import time"),
        ("hydro_slurm__study__run", "try:\n    import torch\nexcept ImportError:\n    torch = None", "import time"),
        ("hydro_slurm__study__run", "class A:\n    import torch", "import time"),
        ("hydro_slurm__study__run", "def f():\n    import hydro_trials.study", "never imports hydro_trials"),
        ("hydro_slurm__novel__part", "import hydro_slurm.model", "new part"),
        ("hydro_trials__train", "import hydro_sim", "never imports hydro_sim"),
        ("hydro_trials__train", "from hydro_slurm.study import x", "hydro_trials may import"),
        ("hydro_sim__engine", "from hydro_trials import x", "never imports hydro_trials"),
        ("hydro_sim__engine", "from hydro_slurm.slurm import x", "hydro_sim may import"),
        ("hydro_slurm__gate__page", "def f(x):\n    match x:\n        case 1: pass", "Python 3.9"),
    ],
)
def test_offence_is_found(tmp_path: Path, module: str, source: str, fragment: str) -> None:
    other = {"hydro_slurm__policy__place": "", "hydro_slurm__model": ""} | {module: source}
    offences = check_arrows.check(make_tree(tmp_path, **other))
    assert len(offences) == 1
    assert fragment in offences[0]


def test_clean_tree_passes(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path,
        hydro_slurm__model="import json",
        hydro_slurm__gate__page="from hydro_slurm import model\nfrom . import layout",
        hydro_slurm__gate__layout="import mmap",
        hydro_slurm__hooks__hook="def f():\n    import torch, deepspeed",
        hydro_slurm__study__run="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nimport optuna",
        hydro_trials__train="import torch\nfrom hydro_slurm.gate import page",
        hydro_sim__engine="import pandas\nfrom hydro_slurm import policy",
        hydro_slurm__policy__place="from hydro_slurm import model",
    )
    assert check_arrows.check(tree) == []


def test_what_a_hook_imports_must_run_on_python_39_too(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path,
        hydro_slurm__hooks__hook="from hydro_slurm.slurm import client",
        hydro_slurm__slurm__client="import tomllib",
        hydro_slurm__slurm__unreached="import tomllib",
    )
    (offence,) = check_arrows.check(tree)
    assert offence.startswith("hydro_slurm/slurm/client.py:1:")


def test_importing_the_control_plane_does_not_import_torch(root: Path) -> None:
    modules = [name for name in check_arrows.modules_of(root) if name.startswith("hydro_slurm")]
    modules = [name for name in modules if not name.endswith("__main__")]
    script = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print([name for name in ('torch', 'deepspeed', 'hydro_trials') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def find_python39() -> str | None:
    """An interpreter that really is Python 3.9: on PATH, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [shutil.which("python3.9"), *map(str, sorted(pyenv.glob("versions/3.9*/bin/python3.9")))]
    for candidate in filter(None, candidates):
        command = [candidate, "-c", "import sys; print(sys.version_info[:2])"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip() == "(3, 9)":
            return candidate
    return None


def test_what_runs_in_the_hosts_environment_imports_on_python_39(root: Path) -> None:
    python = find_python39()
    if python is None:
        pytest.skip("no Python 3.9 on PATH or under pyenv")
    known = check_arrows.modules_of(root)
    names = [name for name in known if name.startswith("hydro_slurm") and name.split(".")[1:2] != []]
    names = sorted(name for name in names if name.split(".")[1] in check_arrows.HOST_PARTS)
    names = [name for name in names if not name.endswith("__main__")]
    script = f"import importlib, sys; sys.path.insert(0, {str(root)!r}); sys.dont_write_bytecode = True\n"
    script += f"for name in {names!r}: importlib.import_module(name)"
    done = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
