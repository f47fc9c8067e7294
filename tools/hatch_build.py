"""What the wheel holds beside its packages: the examples, as hydro_trials/examples.

An editable install finds them in trials/examples; copies of them would go stale there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ExamplesHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds each file of trials/examples to wheels that are not editable."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        examples = Path(self.root, "trials", "examples")
        for path in sorted(examples.glob("*.py")):
            build_data["force_include"][str(path)] = f"hydro_trials/examples/{path.name}"
