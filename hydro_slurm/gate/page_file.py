"""Making page files, and directories that nobody else can tamper with. Standard library only, Python 3.9."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from hydro_slurm.errors import GateError
from hydro_slurm.gate.layout import PAGE_BYTES, head_bytes

PAGE_MODE = 0o644
DIRECTORY_MODE = 0o755


def make_directory(directory: Path) -> None:
    """Create a directory and its missing parents, each 0755 whatever the umask says.

    Raises:
        GateError: It cannot be made, or somebody else could swap what lies in it.
    """
    try:
        for part in [*reversed(directory.parents), directory]:
            with contextlib.suppress(FileExistsError):
                part.mkdir(DIRECTORY_MODE)
                part.chmod(DIRECTORY_MODE)
    except OSError as error:
        raise GateError(
            f"cannot create the gate directory {directory}: {error.strerror}; set HYDRO_RUN to a place you may write"
        ) from None
    _require_own(directory)


def _require_own(directory: Path) -> None:
    """In /dev/shm anybody may make the directory that we would have made: then its maker could swap our page."""
    for part in (directory, *directory.parents):
        status = part.lstat()
        if stat.S_ISLNK(status.st_mode):
            status = part.stat()
        if status.st_uid not in (0, os.geteuid()):
            raise GateError(
                f"{part} belongs to uid {status.st_uid}, a gate's directories must belong to you or to root; "
                "remove it, or set HYDRO_RUN to another place"
            )
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX:
            raise GateError(f"{part} can be changed by others (mode {stat.S_IMODE(status.st_mode):o}); chmod go-w it")


def create_page(path: Path, magic: bytes, contents: bytes) -> int:
    """Put a new page in place of whatever has its name; the descriptor to write it by.

    A reader finds the old page or the new one, complete, and never a part.

    Args:
        path: Its name, in an existing directory.
        magic: What it is.
        contents: Everything behind the head, from offset 16 on.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.fchmod(descriptor, PAGE_MODE)
        os.pwrite(descriptor, (head_bytes(magic) + contents).ljust(PAGE_BYTES, b"\0"), 0)
        Path(name).rename(path)
    except BaseException:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
    return descriptor


def names_this(path: Path, descriptor: int) -> bool:
    """Whether `path` still leads to the file that is open as `descriptor`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False
