"""What a testbed shall look like."""

from __future__ import annotations

import re
import secrets
import site
import sys
from dataclasses import dataclass, field
from pathlib import Path

from hydro_slurm.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_GRES = re.compile(r"([a-z][a-z0-9_]*)(?::([A-Za-z][A-Za-z0-9_]*))?(?::([0-9]+))?")
MAX_NODES = 64


@dataclass(frozen=True)
class Gres:
    """One generic resource of every node: `gpu:2` or `bubble:g0:1`."""

    name: str
    kind: str
    count: int


def default_exposed() -> tuple[Path, ...]:
    """What a job needs in order to run this Python with this package: interpreter, environment, checkout."""
    paths = [Path(__file__).parents[2], Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable)]
    paths += [Path(path) for path in site.getsitepackages()]
    return tuple(dict.fromkeys(path for path in paths if path.exists() and path != Path("/")))


@dataclass(frozen=True, kw_only=True)
class TestbedSpec:
    """A private cluster: so many nodes, all alike. Nodes are called n1, n2, ..."""

    __test__ = False  # not a test class, whatever pytest makes of its name

    nodes: int = 4
    cpus: int = 2
    """CPUs that each node says it has; may be more than the machine has."""
    memory_mib: int = 4096
    gres: str = ""
    """GRES of each node as Slurm writes it (`gpu:2`); device files are stand-ins where there are no devices."""
    name: str | None = None
    """Letters, digits, `-` and `_`; null makes one up."""
    base: Path | None = None
    """Folder that holds the state of testbeds; null is `$HYDRO_TESTBED_DIR`, else `/tmp/hydro-testbed-UID`."""
    expose: tuple[Path, ...] = field(default_factory=default_exposed)
    """Trees that every user of the cluster can reach even if they lie in somebody's closed home."""
    kill_wait_s: int = 5
    """Slurm's KillWait: seconds between SIGTERM and SIGKILL."""
    extra_conf: tuple[str, ...] = ()
    """Further lines for slurm.conf."""
    start_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for what, value, largest in (("nodes", self.nodes, MAX_NODES), ("cpus", self.cpus, 4096)):
            if not 1 <= value <= largest:
                raise ConfigError(f"testbed: {what} must lie between 1 and {largest}, got {value}")
        if self.memory_mib < self.cpus:
            raise ConfigError(f"testbed: memory_mib must be at least 1 MiB for each CPU, got {self.memory_mib}")
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise ConfigError(f"testbed: name must be up to 32 letters, digits, '-' or '_', got {self.name!r}")
        parse_gres(self.gres)

    @property
    def node_names(self) -> tuple[str, ...]:
        return tuple(f"n{number}" for number in range(1, self.nodes + 1))


def parse_gres(text: str) -> tuple[Gres, ...]:
    """The resources that a string like `gpu:2,bubble:g0:1` names.

    Raises:
        ConfigError: It is not of that form.
    """
    found = []
    for part in filter(None, text.split(",")):
        match = _GRES.fullmatch(part)
        if match is None or not 1 <= int(match[3] or 1) <= 1024:
            raise ConfigError(f"testbed: gres must look like gpu:2 or bubble:g0:1, got {part!r}")
        found.append(Gres(match[1], match[2] or "", int(match[3] or 1)))
    return tuple(found)


def made_up_name() -> str:
    return f"t-{secrets.token_hex(3)}"
