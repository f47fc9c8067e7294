"""Imports a study file. Whatever is wrong in it becomes one line that names the file and the place."""

from __future__ import annotations

import importlib.util
import linecache
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from hydro_slurm.errors import HydroError, StudyError
from hydro_trials.study import Data, Study


def load_study(path: Path) -> Study:
    """The one `Study` at the top level of the Python file at `path`.

    The file's folder is put at the head of `sys.path`, so that the file may import its neighbours.

    Raises:
        StudyError: No such file, it does not import, or it holds no study or several.
    """
    path = path.absolute()
    if not path.is_file():
        raise StudyError(f"{path}: no such study file")
    module = _import(path)
    studies = {id(value): name for name, value in vars(module).items() if isinstance(value, Study)}
    if len(studies) != 1:
        found = ", ".join(sorted(studies.values())) or "none"
        raise StudyError(f"{path}: needed exactly one hydro.Study(...) at the top level, found {found}")
    study = vars(module)[next(iter(studies.values()))]
    assert isinstance(study, Study)
    return study


def load_data(study: Study) -> Data:
    """Call the study's `data` and check what it returns.

    Raises:
        StudyError: It raises, or returns something else than pairs of tensors of equal length.
    """
    import torch
    from torch.utils._pytree import tree_leaves

    try:
        data: Any = study.data()
    except HydroError:
        raise
    except Exception as error:
        raise StudyError(f"{describe_error(error)} (in the study's data())") from error
    if not isinstance(data, Data):
        raise StudyError(f"Study.data returned {type(data).__name__}, needed hydro.Data(train=(x, y), valid=(x, y))")
    for part in ("train", "valid"):
        pair: Any = getattr(data, part)
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise StudyError(f"Data.{part}: needed a pair (inputs, targets) of tensors, got {type(pair).__name__}")
        sizes = []
        for what, tree in zip(("inputs", "targets"), pair, strict=True):
            leaves = tree_leaves(tree)
            if not leaves or not all(torch.is_tensor(leaf) and leaf.dim() for leaf in leaves):
                raise StudyError(
                    f"Data.{part}: needed a pair (inputs, targets) of tensors; the {what} are {tree!r:.80}"
                )
            sizes += [len(leaf) for leaf in leaves]
        if len(set(sizes)) != 1 or sizes[0] == 0:
            raise StudyError(f"Data.{part}: got {sizes[0]} inputs and {sizes[-1]} targets, needed equally many")
    largest = max(study.batch_sizes)
    num_samples = len(tree_leaves(data.train[0])[0])
    if num_samples < largest:
        raise StudyError(f"Study.batch_size: got {largest}, but there are only {num_samples} training samples")
    return data


def describe_error(error: BaseException, path: Path | None = None) -> str:
    """One line: where in the user's code (in `path`'s folder, if given) an exception came from, and what it says."""
    what = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {what}"
    frames = traceback.extract_tb(error.__traceback__)
    folder = str(path.parent) if path else None
    package = str(Path(__file__).parent)
    own = [
        frame
        for frame in frames
        if not frame.filename.startswith((package, "<"))
        and (frame.filename.startswith(folder) if folder else "site-packages" not in frame.filename)
    ]
    return f"{own[-1].filename}:{own[-1].lineno}: {what}" if own else what


def _import(path: Path) -> ModuleType:
    name = f"hydro_study_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise StudyError(f"{path}: not a Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[name] = module  # dataclasses and pickle look the module up while it is being executed
    linecache.checkcache(str(path))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise StudyError(describe_error(error, path)) from error
    return module
