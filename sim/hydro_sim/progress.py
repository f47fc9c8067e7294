"""One line of progress on a terminal; nothing where nobody looks."""

from __future__ import annotations

import shutil
import sys
import time


class ProgressBar:
    """A bar that is drawn anew on stderr, at most ten times a second."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._next_s = 0.0

    def show(self, share: float, text: str) -> None:
        """Draw the present state."""
        if not self._live or time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + 0.1
        bar = "█" * round(20 * share) + "░" * (20 - round(20 * share))
        line = f"{bar} {100 * share:3.0f} % {text}"
        print(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the line empty."""
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
