"""Runs inside the new namespaces of one machine of the testbed: makes its mounts, then turns into its holder.

Started by path (`python -I -S namespace.py SETTINGS READY_FD`) under `unshare`, so it imports the standard library
only. A machine gets a `/dev/shm`, `/run` (with `/run/hydro`), `/etc/hosts`, `/etc/slurm` and host name of its own.
Trees that ordinary users could not reach are exposed: see `expose`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import stat
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

MARKER = Path("/run/hydro-testbed")
"""Holds the uuids of the testbeds that a namespace belongs to, outermost first: how a process is known to be ours."""

MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 1 << 12, 1 << 13, 1 << 14, 1 << 18
MNT_DETACH = 2
ASIDE = Path("/dev/shm/.aside")
MAX_SYMLINKS = 40

_libc = ctypes.CDLL(None, use_errno=True)


def main(argv: Sequence[str]) -> None:
    settings, ready = json.loads(argv[1]), int(argv[2])
    try:
        furnish(settings)
    except OSError as error:
        os.write(ready, f"{error}".encode())
        sys.exit(1)
    os.set_inheritable(ready, False)  # end of file, unless the creator is gone: then this write kills us
    os.write(ready, b"ok")
    title = f"hydro-testbed {settings['testbed']} {settings['hostname']}"
    os.execv("/bin/sleep", [title, "infinity"])


def furnish(settings: dict[str, object]) -> None:
    """Make all mounts of this machine."""
    mount(None, Path("/"), flags=MS_REC | MS_PRIVATE)
    mount_tmpfs(Path("/dev/shm"), "1777")
    exposed = settings["expose"]
    assert isinstance(exposed, list)
    if os.geteuid() == 0:
        expose(Path(path) for path in exposed)
    # Inside another testbed: belong to that one as well, so that its end is ours.
    outer = MARKER.read_text() if MARKER.exists() else ""
    overlay(Path("/run"), leave_out=("hydro", MARKER.name))
    Path("/run/hydro").mkdir(mode=0o755)
    mount_tmpfs(Path("/run/hydro"), "0755")
    conf = Path(str(settings["conf_dir"]))
    if Path("/etc/slurm").is_dir():
        mount(conf, Path("/etc/slurm"), flags=MS_BIND)
    if Path("/etc/hosts").exists():
        mount(conf / "hosts", Path("/etc/hosts"), flags=MS_BIND)
    name = str(settings["hostname"]).encode()
    _check(_libc.sethostname(name, len(name)), "sethostname")
    with contextlib.suppress(FileNotFoundError):
        ASIDE.rmdir()
    MARKER.write_text(f"{outer}{settings['uuid']}\n")
    MARKER.chmod(0o644)


def expose(paths: Iterable[Path]) -> None:
    """Let every user of this machine reach `paths`, whatever the modes of the directories above them.

    A directory above that others may not pass is hidden behind an empty one that holds nothing but the way to the
    exposed trees. The trees are the real ones, with their real modes; nothing outside this namespace changes.
    A closed directory *inside* an exposed tree (or its top) is opened instead: it keeps its entries.
    """
    links: dict[Path, str] = {}
    reals: set[Path] = set()
    for path in paths:
        found, real = follow(path)
        links.update(found)
        if real.exists():
            reals.add(real)
    order = sorted(reals, key=lambda path: len(path.parts))
    for path in order:
        while (closed := first_closed(path)) is not None:
            if any(closed == tree or tree in closed.parents for tree in order):
                overlay(closed)
            else:
                _hide(closed, order, links)


def follow(path: Path) -> tuple[dict[Path, str], Path]:
    """All symbolic links on the way along `path` (link: target), and where it leads in the end."""
    links: dict[Path, str] = {}
    rest = [part for part in reversed(Path(os.path.abspath(path)).parts) if part != "/"]  # noqa: PTH100
    here = Path("/")
    num_followed = 0
    while rest and num_followed < MAX_SYMLINKS:
        part = rest.pop()
        if part == "..":
            here = here.parent
            continue
        step = here / part
        if not step.is_symlink():
            here = step
            continue
        target = str(step.readlink())
        links[step] = target
        num_followed += 1
        if target.startswith("/"):
            here = Path("/")
        rest.extend(part for part in reversed(Path(target).parts) if part != "/")
    return links, here


def first_closed(path: Path) -> Path | None:
    """The topmost directory on the way to `path`, itself included, that not everybody may pass (or, itself, list)."""
    for directory in reversed(path.parents):
        if not directory.stat().st_mode & stat.S_IXOTH:
            return directory
    wanted = stat.S_IXOTH | stat.S_IROTH
    return path if path.is_dir() and path.stat().st_mode & wanted != wanted else None


def _hide(closed: Path, order: list[Path], links: dict[Path, str]) -> None:
    below = [path for path in order if closed in path.parents]
    tops = [path for path in below if not any(other in path.parents for other in below)]
    for number, path in enumerate(tops):
        put_aside(path, ASIDE / str(number))
    mount_tmpfs(closed, "0755")
    for number, path in enumerate(tops):
        make_target(path, ASIDE / str(number))
        mount(ASIDE / str(number), path, flags=MS_MOVE)
        _remove_target(ASIDE / str(number))
    for link, target in links.items():
        if closed in link.parents and not link.is_symlink() and not any(top in link.parents for top in tops):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)


def overlay(directory: Path, leave_out: Sequence[str] = ()) -> None:
    """Put a tmpfs that everybody may read over `directory`, with its entries bound (or, links, copied) into it."""
    aside = ASIDE / "whole"
    put_aside(directory, aside)
    mount_tmpfs(directory, "0755")
    for entry in sorted(aside.iterdir()):
        if entry.name in leave_out:
            continue
        target = directory / entry.name
        with contextlib.suppress(FileNotFoundError):  # gone in the meantime
            if entry.is_symlink():
                target.symlink_to(entry.readlink())
            else:
                make_target(target, entry)
                mount(entry, target, flags=MS_BIND | MS_REC)
    _check(_libc.umount2(bytes(aside), MNT_DETACH), f"unmounting {aside}")
    aside.rmdir()


def put_aside(path: Path, aside: Path) -> None:
    make_target(aside, path)
    mount(path, aside, flags=MS_BIND | MS_REC)


def make_target(target: Path, like: Path) -> None:
    """Make the directory or empty file that a bind mount of `like` needs."""
    if stat.S_ISDIR(like.stat().st_mode):
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()


def _remove_target(target: Path) -> None:
    if target.is_dir():
        target.rmdir()
    else:
        target.unlink()


def mount_tmpfs(target: Path, mode: str) -> None:
    mount(Path("tmpfs"), target, kind="tmpfs", data=f"mode={mode}")


def mount(
    source: Path | None, target: Path, *, kind: str | None = None, flags: int = 0, data: str | None = None
) -> None:
    """mount(2).

    Raises:
        OSError: With the kernel's reason and the target.
    """
    code = _libc.mount(
        bytes(source) if source else None,
        bytes(target),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        data.encode() if data else None,
    )
    _check(code, f"mounting {source or ''} on {target}")


def _check(code: int, what: str) -> None:
    if code != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    os.umask(0o022)
    main(sys.argv)
