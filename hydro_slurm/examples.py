"""Where the examples lie: host scripts and studies that people can run and copy."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hydro_slurm.errors import HydroError


def example_path(name: str) -> Path:
    """The file of an example, with or without `.py` in its name.

    In a checkout (and an editable install of it) examples lie in trials/examples, in an installed wheel in
    hydro_trials/examples.

    Raises:
        HydroError: There is no example of this name; the message names those that exist.
    """
    found: dict[str, Path] = {}
    for directory in _directories():
        for path in sorted(directory.glob("*.py")):
            found.setdefault(path.stem, path)
    wanted = name.removesuffix(".py")
    if wanted not in found:
        existing = ", ".join(sorted(found)) or "none (is hydro-slurm installed whole?)"
        raise HydroError(f"no example is called {name!r}; there are: {existing}")
    return found[wanted]


def _directories() -> list[Path]:
    directories = [Path(__file__).resolve().parent.parent / "trials" / "examples"]
    # Found, not imported: the data plane imports torch.
    spec = importlib.util.find_spec("hydro_trials")
    if spec is not None:
        directories += [Path(location) / "examples" for location in spec.submodule_search_locations or ()]
    return directories
