"""What the hook's tests share: a gate that only remembers, and DeepSpeed's extension built once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class RecordingPublisher:
    """Remembers what a reporter made of its gate; fails when told to."""

    def __init__(self) -> None:
        self.state = "closed"
        self.leases: list[tuple[int, int]] = []
        self.num_epochs = self.num_heartbeats = 0
        self.error: Exception | None = None

    def _perhaps_fail(self) -> None:
        if self.error is not None:
            raise self.error

    def open(self, deadline_ns: int, *, iteration: int = 0, free_bytes: int = 0) -> None:
        self._perhaps_fail()
        self.state = "open"
        self.leases.append((iteration, deadline_ns))

    def close(self) -> None:
        self._perhaps_fail()
        self.state = "closed"

    def bump_epoch(self) -> None:
        self.num_epochs += 1
        self.close()

    def heartbeat(self) -> None:
        self.num_heartbeats += 1

    def leave(self) -> None:
        self.state = "gone"


@pytest.fixture
def publisher() -> RecordingPublisher:
    return RecordingPublisher()


@pytest.fixture(scope="session")
def deepspeed_environment() -> dict[str, str]:
    """The environment of a DeepSpeed process on CPUs, its extension built (once, into the checkout's build folder)."""
    for module in ("torch", "deepspeed"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment.update(
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="lo",
        TORCH_EXTENSIONS_DIR=os.environ.get("TORCH_EXTENSIONS_DIR") or str(ROOT / "build" / "torch_extensions"),
    )
    Path(environment["TORCH_EXTENSIONS_DIR"]).mkdir(parents=True, exist_ok=True)
    build = (
        "from deepspeed.accelerator import get_accelerator as a; a().create_op_builder('ShareMemCommBuilder').load()"
    )
    subprocess.run([sys.executable, "-c", build], env=environment, check=True, capture_output=True, timeout=600)
    return environment
