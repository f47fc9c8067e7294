"""The records that parts of the system exchange, and the words for their states.

Files made of them are read and written by `formats`. Standard library only, Python 3.9: the host's side imports this.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Optional

HOST_COMMENT = "hydro:share"
"""A job with this word in its comment offers its bubbles."""

# Trial states. Optuna knows WAITING to FAIL; PREEMPTED and DIVERGED tell apart what Optuna calls WAITING and FAIL.
WAITING, RUNNING, COMPLETE, PRUNED, FAIL = "WAITING", "RUNNING", "COMPLETE", "PRUNED", "FAIL"
PREEMPTED, DIVERGED = "PREEMPTED", "DIVERGED"
ENDED_STATES = frozenset({COMPLETE, PRUNED, FAIL, DIVERGED})

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""What a study or bundle may be called: it becomes part of file names and job names."""


def hydro_home() -> Path:
    """The user's own directory on the shared file system: `$HYDRO_HOME`, else `~/.hydro`."""
    return Path(os.environ.get("HYDRO_HOME") or Path.home() / ".hydro")


def slot_report_dir() -> Path:
    """Where hosts leave their slot reports: `$HYDRO_REPORT_DIR`, else `slots` in `hydro_home()`."""
    return Path(os.environ.get("HYDRO_REPORT_DIR") or hydro_home() / "slots")


def run_dir() -> Path:
    """Node-local shared memory for gates: `$HYDRO_RUN`, else `/dev/shm/hydro-UID` (own mode)."""
    return Path(os.environ.get("HYDRO_RUN") or f"/dev/shm/hydro-{os.getuid()}")


def gate_dir(base: Path, node: str, job_id: int, local_rank: int) -> Path:
    """The directory of one slot's gate: it holds `page` and `bundles/`."""
    return base / node / str(job_id) / str(local_rank)


@dataclass(frozen=True)
class Device:
    """What a slot computes on. `cpus` are the CPU numbers that the host rank is bound to (kind "cpu")."""

    kind: str = "cpu"
    index: int = 0
    cpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class GuardReport:
    """The guard's estimate of the host's slowdown: a fraction of the iteration time (0.01 = 1 %)."""

    state: str = "learning"
    """learning, open, or shut."""
    slowdown: Optional[float] = None
    slowdown_ci95: Optional[tuple[float, ...]] = None
    num_control: int = 0
    num_shared: int = 0


@dataclass(frozen=True)
class SlotReport:
    """One slot as its host rank describes it: a small file in the report directory, replaced every 15 s."""

    FORMAT: ClassVar[str] = "hydro.slot"
    VERSION: ClassVar[int] = 1

    node: str
    job_id: int
    local_rank: int
    global_rank: int
    pid: int
    gate_dir: str
    device: Device
    stage: int
    num_stages: int
    iteration: int
    iteration_s: Optional[float]
    """Median iteration time; null while it is being learned."""
    bubble_s_per_s: float
    """Expected usable bubble seconds per second (0 while nothing is predicted)."""
    gap_quantiles_ms: dict[str, float]
    """Quantiles of the usable gaps' durations: p10, p25, p50, p75, p90; empty while learning."""
    free_bytes: int
    guard: GuardReport
    written_at_s: float
    """Wall clock, seconds since the epoch."""

    @property
    def file_name(self) -> str:
        return f"{self.job_id}.{self.node}.{self.local_rank}.json"


@dataclass(frozen=True)
class LaneSpec:
    """One trial as a bundle trains it."""

    trial: int
    params: dict[str, Any]
    seed: int
    checkpoint: Optional[str] = None
    """Absolute path of a checkpoint to go on from; null starts at step 0."""


@dataclass(frozen=True)
class BundleSlot:
    """Where a bundle runs: behind a gate (kind "bubble"), or alone in the study's own allocation (kind "own")."""

    kind: str
    node: str
    device: Device
    gate_dir: Optional[str] = None
    job_id: int = 0
    local_rank: int = 0


@dataclass(frozen=True)
class BundleSpec:
    """`bundles/ID/spec.json`, written by the study's controller before the bundle starts."""

    FORMAT: ClassVar[str] = "hydro.bundle"
    VERSION: ClassVar[int] = 1

    bundle: str
    study: str
    study_dir: str
    study_file: str
    purpose: str
    """search (surrogate, width scale S) or verify (target, S = 1)."""
    width_scale: float
    max_lanes: int
    """Max fusion count: more lanes than this wait inside the bundle until a place is free."""
    lanes: tuple[LaneSpec, ...]
    rungs: tuple[int, ...]
    """Steps after which a lane is evaluated; the last one is its budget."""
    slot: BundleSlot
    memory_cap_bytes: Optional[int] = None
    """What the process may hold; coming close to it halves the lanes."""
    quantum_ms: Optional[float] = None
    """Longest time between two boundaries that the slot's bubbles have room for."""
    checkpoint_every_s: float = 30.0
    idle_exit_s: float = 60.0
    """A bundle without lanes waits this long for a refill, then exits 0."""
    timeline: bool = False


@dataclass(frozen=True)
class InboxMessage:
    """`bundles/ID/inbox/N.json`, N counting from 1: what the controller tells a running bundle."""

    FORMAT: ClassVar[str] = "hydro.inbox"
    VERSION: ClassVar[int] = 1

    kind: str
    """refill (lanes), stop (trials), resize (max_lanes), or finish (checkpoint everything and leave)."""
    lanes: tuple[LaneSpec, ...] = ()
    trials: tuple[int, ...] = ()
    max_lanes: int = 0
    """The new max fusion count of a resize; lanes beyond it wait, from a checkpoint."""
    reason: str = ""


@dataclass(frozen=True)
class TrialResult:
    """`bundles/ID/results/TRIAL.RUNG.json`, written by the bundle: one evaluation, or a lane's end."""

    FORMAT: ClassVar[str] = "hydro.result"
    VERSION: ClassVar[int] = 1

    trial: int
    rung: int
    """Index into the bundle's rungs."""
    step: int
    state: str
    """RUNNING (a rung passed), COMPLETE (the last rung), DIVERGED (not finite), or FAIL."""
    value: Optional[float]
    """The objective; null where it is not a finite number."""
    metrics: dict[str, Optional[float]]
    bundle: str
    lane_seconds: float
    """The lane's share of the bundle's computing time so far, in seconds."""
    written_at_s: float
    reason: str = ""
    checkpoint: Optional[str] = None


@dataclass(frozen=True)
class BundleProgress:
    """`bundles/ID/progress.json`, replaced about every second by the bundle."""

    FORMAT: ClassVar[str] = "hydro.progress"
    VERSION: ClassVar[int] = 1

    bundle: str
    pid: int
    state: str
    """starting, running, idle, finishing, or ended."""
    num_lanes: int
    num_waiting: int
    lane_steps: int
    """Optimizer steps summed over lanes, all since the start of this bundle."""
    compute_s: float
    """Seconds spent computing (between resume and pause)."""
    cpu_s: float
    """The process's CPU time."""
    peak_bytes: int
    quantum_p99_us: float
    last_inbox: int
    """Number of the last inbox message that was carried out."""
    written_at_s: float
    checkpoints: dict[str, str] = field(default_factory=dict)
    """Newest complete checkpoint of each unfinished trial (trial number as a string: absolute path)."""
    steps: dict[str, int] = field(default_factory=dict)
    """Steps done by each unfinished trial."""
    max_lanes: int = 0
    """What the max fusion count has become (memory, a model that cannot be fused); 0 before anything is known."""
    warning: str = ""
    """Why the bundle runs otherwise than it was asked to."""


@dataclass(frozen=True)
class ProfilePoint:
    """What was measured at one fusion count, run one way."""

    lanes: int
    kind: str
    """general, fast, compiled or separate: how lanes are run."""
    depth: Optional[int]
    """How deep into the module tree the gate is asked; null for everywhere."""
    step_ms: float
    """Median duration of one optimizer step of all lanes."""
    lane_steps_per_s: float
    quantum_p99_us: float
    """99th percentile of the time between two boundaries."""
    peak_bytes: int
    """The process's own peak; on a GPU, of its memory on the device."""


@dataclass(frozen=True)
class Profile:
    """`profiles/KEY.json`: memory and throughput of a study's lanes, by fusion count. Written by the planner."""

    FORMAT: ClassVar[str] = "hydro.profile"
    VERSION: ClassVar[int] = 2

    key: str
    """Of the model's shapes, optimizer, width scale, batch, type and device."""
    study: str
    width_scale: float
    batch_size: int
    dtype: str
    device: str
    """The processor's or the GPU's own name."""
    num_threads: int
    points: tuple[ProfilePoint, ...]
    """The fastest way at each fusion count, rising."""
    others: tuple[ProfilePoint, ...]
    """The slower ways."""
    refused: dict[str, str]
    """Ways that the model cannot be run, with the reason."""
    knee_lanes: int
    """The smallest fusion count with at least 95 % of the best throughput, within the limits; 0 where measuring was cut
    short."""
    base_bytes: int
    """Memory before any lane."""
    lane_bytes: int
    """Memory that one more lane adds."""
    stopped: str = ""
    """Why no larger fusion count was tried."""
