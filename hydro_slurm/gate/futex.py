"""Waiting for a 32-bit word to change, and waking those who wait: Linux futexes through ctypes.

Not the private kind: the word lies in a file that processes share. Waiters say what they wait for, so that a host that
closes its gate does not wake the bundles on its own core just to tell them to sleep on. Where the kernel refuses
futexes (seccomp), waiting is a bounded sleeping poll. Standard library only, Python 3.9.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import platform
import struct
import time
from typing import Callable

from hydro_slurm.gate.layout import WAKE_CLOSED, WAKE_GONE, WAKE_OPEN

WAKE_ANY = WAKE_OPEN | WAKE_CLOSED | WAKE_GONE

POLL_S = 0.001
"""Where there are no futexes the word is looked at this often."""

_NUMBERS = {"x86_64": 202, "aarch64": 98}
_WAIT_BITSET, _WAKE_BITSET = 9, 10
_NUMBER = _NUMBERS.get(platform.machine(), -1) if struct.calcsize("P") == 8 else -1


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_int64), ("tv_nsec", ctypes.c_int64))


_waiting = ctypes.CDLL(None, use_errno=True).syscall
_waking = ctypes.PyDLL(None).syscall
"""Keeps the GIL: it never blocks, and a host rank must not lose its turn among its own threads for it."""


def map_page(descriptor: int, num_bytes: int) -> int:
    """Map the start of a file read-only and shared; the mapping's address.

    Made by hand, because a futex needs the address, which Python's read-only mmap objects keep to themselves.
    """
    address = _mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        number = ctypes.get_errno()
        raise OSError(number, f"mmap: {errno.errorcode.get(number, number)}")
    return int(address)


def unmap_page(address: int, num_bytes: int) -> None:
    """Undo `map_page`."""
    _munmap(address, num_bytes)


_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Futex:
    """The word at one address of a shared mapping. The address is handed to the kernel and never touched here.

    Args:
        address: Where the word is mapped.
        load: Reads the word; used only where the kernel refuses futexes.
    """

    def __init__(self, address: int, load: Callable[[], int]) -> None:
        self._address = ctypes.c_void_p(address)
        self._load = load
        self._polls = _NUMBER < 0
        self._wake_arguments = {
            bits: (
                ctypes.c_long(_NUMBER),
                self._address,
                ctypes.c_int(_WAKE_BITSET),
                ctypes.c_int(0x7FFFFFFF),
                None,
                None,
                ctypes.c_uint32(bits),
            )
            for bits in (WAKE_OPEN, WAKE_CLOSED, WAKE_ANY)
        }

    def wake(self, bits: int) -> None:
        """Wake everybody who waits for one of these changes."""
        if not self._polls:
            _waking(*self._wake_arguments[bits])

    def wait(self, expected: int, timeout_s: float, bits: int = WAKE_ANY) -> bool:
        """Sleep while the word is `expected`, until woken, for `timeout_s` at most, or until a signal comes.

        Returns:
            False where the wait could not be made (the page has shrunk): there is nothing left to wait for.
        """
        if timeout_s <= 0:
            return True
        if self._polls:
            return self._poll(expected, timeout_s)
        end_ns = time.monotonic_ns() + int(timeout_s * 1e9)
        timeout = _Timespec(end_ns // 1_000_000_000, end_ns % 1_000_000_000)
        result = _waiting(
            ctypes.c_long(_NUMBER),
            self._address,
            ctypes.c_int(_WAIT_BITSET),
            ctypes.c_uint32(expected),
            ctypes.byref(timeout),
            None,
            ctypes.c_uint32(bits),
        )
        if result == 0:
            return True
        number = ctypes.get_errno()
        if number in (errno.ENOSYS, errno.EPERM, errno.EACCES):
            self._polls = True
            return self._poll(expected, timeout_s)
        return number != errno.EFAULT

    def _poll(self, expected: int, timeout_s: float) -> bool:
        end_ns = time.monotonic_ns() + int(timeout_s * 1e9)
        while self._load() == expected and time.monotonic_ns() < end_ns:
            time.sleep(POLL_S)
        return True
