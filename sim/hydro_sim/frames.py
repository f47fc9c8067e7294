"""A run's tables as pandas frames, for notebooks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hydro_slurm.errors import SimulationError

if TYPE_CHECKING:
    import pandas as pd


def read_frames(folder: Path) -> dict[str, pd.DataFrame]:
    """Every table of a folder of results, by its name without `.csv`.

    Columns that end in `_s` and `_h` are numbers (seconds, hours), not-a-number where a job or study has not come that
    far. A table without rows is a frame without columns.

    Raises:
        SimulationError: There is no table in the folder, or pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError:
        raise SimulationError("reading results as frames needs pandas: pip install 'hydro-slurm[sim]'") from None
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise SimulationError(f"{folder}: got no tables, needed a folder that `hydro-sim run` has written")
    return {path.stem: pd.read_csv(path) if path.stat().st_size else pd.DataFrame() for path in paths}
