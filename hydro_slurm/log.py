"""Logging set-up for the commands: standard library, one line per message, ids as key=value."""

from __future__ import annotations

import logging
import sys


def set_up_logging(verbosity: int = 0) -> None:
    """Log to stderr: warnings by default, information at 1, everything at 2 and more."""
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    logging.basicConfig(
        stream=sys.stderr, level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
