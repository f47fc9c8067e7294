"""The way from the control plane to the data plane: `python -m hydro_trials VERB`.

The user's study file and torch are imported in that process and nowhere else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydro_slurm import formats
from hydro_slurm.errors import FormatError, StudyError
from hydro_slurm.study.description import StudyDescription


def run_verb(verb: str, file: Path, *arguments: str, python: str | None = None, timeout_s: float = 300.0) -> Any:
    """Run one verb on a study file and parse what it prints.

    Raises:
        StudyError: The verb failed; its one line says why. Or it took too long, or printed no JSON.
    """
    argv = [python or sys.executable, "-m", "hydro_trials", verb, str(file), "--json", *arguments]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise StudyError(
            f"{file}: `hydro_trials {verb}` took longer than {timeout_s:.0f} s; does the file train on import?"
        ) from None
    except OSError as error:
        raise StudyError(f"cannot run {argv[0]}: {error.strerror}") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise StudyError(lines[-1].removeprefix("hydro: ") if lines else f"{file}: {verb} exited {done.returncode}")
    try:
        return json.loads(done.stdout)
    except ValueError:
        raise StudyError(f"{file}: {verb} printed no JSON but {done.stdout[:80]!r}; does the file print?") from None


def describe(file: Path) -> StudyDescription:
    """What a study file defines.

    Raises:
        StudyError: It does not import, defines no study, or one that cannot run.
    """
    if not file.is_file():
        raise StudyError(f"there is no study file {file}")
    try:
        return formats.from_document(StudyDescription, run_verb("describe", file), str(file))
    except FormatError as error:
        raise StudyError(str(error)) from None
