"""What a bundle does to its process before it computes: CPU binding, and a start-up that yields to the host.

Importing torch and building models takes seconds that no gate can cut into quanta. It runs in a thread of the
SCHED_IDLE class, which gets the CPU only while nobody else on it wants to run; the main thread, which trains, keeps the
normal class. (A process of an ordinary user cannot come back from SCHED_IDLE: with RLIMIT_NICE 0, as is usual, the
kernel answers EPERM. The class belongs to a thread, so the thread ends with the start-up.)
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # from malloc.h


def bind_to_cpus(cpus: Iterable[int]) -> bool:
    """Bind the process to these CPU numbers; False (and a warning) where that is not permitted."""
    wanted = set(cpus)
    if not wanted:
        return True
    try:
        os.sched_setaffinity(0, wanted)
    except OSError as error:
        logger.warning("cannot bind to CPUs %s: %s; going on unbound", sorted(wanted), error.strerror)
        return False
    return True


def keep_freed_memory() -> None:
    """Have malloc keep what is freed, instead of giving every large block back to the kernel.

    Otherwise each temporary of a fused step is fresh zeroed pages: elementwise operations then take twice as long.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def die_first_without_memory() -> None:
    """When the node runs out of memory, the kernel is to end this process, not the host."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    except OSError as error:
        logger.warning("cannot volunteer for the out-of-memory killer: %s", error.strerror)


def run_yielding(work: Callable[[], T]) -> T:
    """Run `work` in a SCHED_IDLE thread and wait for it; what it returns or raises comes back here."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        except OSError as error:
            logger.warning("cannot use SCHED_IDLE during start-up: %s", error.strerror)
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="hydro-startup", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)  # with a timeout, so that the main thread handles signals meanwhile
    if errors:
        raise errors[0]
    return results[0]
