"""The parts of a scenario: what a scenario's TOML file may say, and what is assumed where it says nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydro_sim.pipeline import PipelineSpec
from hydro_sim.queueing import SchedulerConfig
from hydro_sim.traces.mapped import ColumnMapping
from hydro_slurm.errors import ConfigError
from hydro_slurm.policy import HostPolicy, MovePolicy, TransferPolicy

TRACE_FORMATS = ("none", "generated", "philly", "helios", "sacct", "mapped")


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionConfig:
    """Nodes that are alike."""

    name: str = "gpu"
    """Jobs of a trace go to the partition of their name, and to the first one if there is none."""
    nodes: int = 1
    devices_per_node: int = 8
    device_type: str = ""

    def __post_init__(self) -> None:
        _check(self.nodes > 0 and self.devices_per_node > 0, f"partition {self.name!r} needs nodes with devices")


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceConfig:
    """The base load: jobs that run on the cluster beside hosts and studies."""

    format: str = "none"
    """none, generated, philly, helios, sacct, or mapped (by `columns`)."""
    file: str = ""
    """Relative to the scenario, else to the folder that TRACES names."""
    time_zone: str = ""
    """Of the times in the file; UTC if empty."""
    max_jobs: int = 0
    """Take only the first ones; 0 takes all."""
    jobs: int = 10_000
    """Generated: number of jobs."""
    load: float = 0.8
    """Generated: device time asked for, as a share of the cluster."""
    columns: ColumnMapping | None = None

    def __post_init__(self) -> None:
        _check(
            self.format in TRACE_FORMATS,
            f"trace.format must be one of {', '.join(TRACE_FORMATS)}, got {self.format!r}",
        )
        _check(
            self.format in ("none", "generated") or bool(self.file), f"trace.format {self.format!r} needs trace.file"
        )
        _check(self.format != "mapped" or self.columns is not None, "trace.format 'mapped' needs [trace.columns]")
        _check(self.load > 0 and self.jobs > 0 and self.max_jobs >= 0, "trace.load and trace.jobs must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class HostConfig:
    """Pipeline-parallel training jobs that share their bubbles."""

    name: str = "host"
    count: int = 1
    user: str = "hosts"
    partition: str = ""
    devices: int = 32
    pipeline: PipelineSpec = field(default_factory=lambda: PipelineSpec(num_stages=4, num_microbatches=8))
    """One iteration; ignored where `timelines` gives a recorded one."""
    timelines: tuple[str, ...] = ()
    """Recorded timelines, one per stage in order: their gaps are the bubbles. Relative to the scenario."""
    gaps_ms: tuple[float, ...] = ()
    """With `iteration_ms`, instead of both: the bubbles of one iteration, the same on every device."""
    iteration_ms: float = 0.0
    duration_h: float = 24.0
    duration_spread: float = 0.0
    """Sigma of the log-normal factor on `duration_h`; 0: all alike."""
    submit_h: float = 0.0
    """Of the first one, after the start of the simulation."""
    over_h: float = 0.0
    """The others follow at random moments within so many hours; 0: all at once."""
    limit_h: float = 0.0
    """Time limit; 0: none is known."""
    from_trace_devices: int = 0
    """Instead of `count` synthetic hosts: jobs of the trace with at least so many devices are the hosts, and those
    with `hydro:share` in their comment, with their own submit times, sizes and durations. `devices` and the settings of
    submission are then ignored."""
    from_trace_hours: float = 0.0
    """With `from_trace_devices`: and with at least this duration."""
    learning_s: float = 60.0
    """From its start until its slots are offered: start-up, and the iterations from which bubbles are learned."""
    free_gib: tuple[float, ...] = ()
    """Free memory per device by stage, or one value for all; empty: not known, so that it limits nothing."""
    checkpoint_every_s: float = 1800.0
    """What a failure throws away at most."""
    slowdown: float = 0.0
    """Assumed slowdown by bundles in all slots, as a fraction of the iteration time."""
    slowdown_source: str = "assumed: none measured"

    def __post_init__(self) -> None:
        _check(self.count >= 0 and self.devices > 0 and self.duration_h > 0, f"host {self.name!r}: bad numbers")
        num_stages = self.num_stages
        _check(
            not self.gaps_ms or self.iteration_ms > sum(self.gaps_ms),
            f"host {self.name!r}: iteration_ms must be more than the sum of gaps_ms",
        )
        _check(
            self.devices % num_stages == 0,
            f"host {self.name!r}: {self.devices} devices do not divide into {num_stages} stages",
        )
        _check(
            len(self.free_gib) in (0, 1, num_stages),
            f"host {self.name!r}: free_gib has {len(self.free_gib)} entries, needed {num_stages}: one per stage",
        )
        _check(self.slowdown >= 0 and self.checkpoint_every_s > 0, f"host {self.name!r}: bad slowdown or checkpoints")

    @property
    def num_stages(self) -> int:
        """Stages whose bubbles differ."""
        return 1 if self.gaps_ms else len(self.timelines) or self.pipeline.num_stages


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """Hyperparameter studies."""

    name: str = "study"
    count: int = 1
    user: str = "researcher"
    """`{n}` becomes the number of the study, from 0."""
    partition: str = ""
    submit_h: float = 0.0
    over_h: float = 0.0
    exclusive_devices: int = 1
    """Devices of its own allocation; 0: it runs in bubbles only."""
    trials: int = 100
    steps: int = 1000
    """Optimizer steps of a trial that is not pruned."""
    rungs: tuple[float, ...] = (1.0,)
    """Where trials are evaluated, as shares of `steps`; the last one is 1."""
    eta: int = 0
    """At each rung but the last, the best 1/eta go on (asynchronous successive halving); 0: nothing is pruned."""
    curve: tuple[tuple[int, float], ...] = ((1, 10.0),)
    """Throughput on a device of its own: [fusion count, lane steps per second] from a profile."""
    relative_speed: dict[str, float] = field(default_factory=dict)
    """Throughput by device type, relative to the one of the profile; 1 for a type that is not listed."""
    profile: str = ""
    """A profile's file instead of `curve`, relative to the scenario."""
    max_lanes: int = 16
    lane_mib: float = 0.0
    top_k: int = 0
    """Configurations that are verified on the target."""
    target_steps: int = 0
    target_curve: tuple[tuple[int, float], ...] = ((1, 1.0),)
    """Like `curve`, on the target; the largest fusion count in it is the largest that is used."""

    def __post_init__(self) -> None:
        ascending = list(self.rungs) == sorted(set(self.rungs)) and self.rungs and self.rungs[0] > 0
        _check(
            bool(ascending) and self.rungs[-1] == 1.0, f"study {self.name!r}: rungs must rise to 1, got {self.rungs}"
        )
        _check(
            self.trials > 0 and self.steps > 0 and self.max_lanes > 0, f"study {self.name!r}: needs trials and steps"
        )
        _check(self.eta == 0 or self.eta > 1, f"study {self.name!r}: eta must be 0 or above 1, got {self.eta}")
        _check(self.exclusive_devices >= 0 and self.count >= 0, f"study {self.name!r}: negative numbers")
        _check(
            self.top_k == 0 or self.target_steps > 0, f"study {self.name!r}: top_k needs target_steps and target_curve"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BubbleConfig:
    """What bubbles are worth."""

    enabled: bool = True
    throughput_share: float = 0.0
    """A bundle's throughput in bubbles as a share of that on a device of its own, where it has been measured; 0:
    computed from the host's schedule."""
    min_gap_ms: float = 3.0
    """Shorter bubbles are not used (the hook's own limit)."""
    margin_ms: float = 2.5
    """Of each bubble, what resuming at its start and pausing before its end cost."""
    efficiency: float = 0.9
    """Of the rest, what a bundle computes in."""
    source: str = "assumed: gate latencies of `benchmarks/gate.py`"

    def __post_init__(self) -> None:
        _check(0 <= self.throughput_share <= 1, "bubbles.throughput_share must lie in [0, 1]")
        _check(0 < self.efficiency <= 1, "bubbles.efficiency must lie in (0, 1]")
        _check(self.min_gap_ms >= 0 and self.margin_ms >= 0, "bubbles: times must be 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class OverheadConfig:
    """What the real system takes its time for, in seconds."""

    poll_s: float = 15.0
    """Between two decisions."""
    launch_s: float = 8.0
    """From a decision to a bundle's first step: step launch, imports, data."""
    refill_s: float = 0.3
    """From a decision to a handed-over lane's first step."""
    leave_s: float = 2.0
    """To checkpoint all lanes and leave."""
    rung_s: float = 0.0
    """Each evaluation at a rung, in device time."""
    study_start_s: float = 5.0
    """From a study's submission to its first decision."""
    study_end_s: float = 0.0
    """From a study's last result to its end."""
    checkpoint_every_s: float = 30.0
    """Between checkpoints of a bundle's lanes: what a failure throws away at most."""
    source: str = "assumed: typical of own mode on the testbed"

    def __post_init__(self) -> None:
        times = (self.poll_s, self.launch_s, self.refill_s, self.leave_s, self.rung_s, self.study_start_s)
        _check(min(times) >= 0 and self.study_end_s >= 0, "overheads must be 0 or more")
        _check(self.poll_s > 0 and self.checkpoint_every_s > 0, "overheads.poll_s and checkpoint_every_s: above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureConfig:
    """Failures, each a Poisson process; 0 means never."""

    node_mtbf_h: float = 0.0
    """Mean time between failures of one node."""
    repair_h: float = 4.0
    host_mtbf_h: float = 0.0
    """Mean time between crashes of one host job on healthy nodes; it is requeued and goes on from a checkpoint."""

    def __post_init__(self) -> None:
        _check(min(self.node_mtbf_h, self.host_mtbf_h) >= 0 and self.repair_h > 0, "failures: bad rates")


@dataclass(frozen=True, kw_only=True, slots=True)
class UserConfig:
    """A user's entitlement."""

    name: str
    weight: float = 1.0
    max_slots: int = -1
    """-1: no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """Thresholds of the policy that the daemon runs too."""

    hosts: HostPolicy = field(default_factory=HostPolicy)
    moves: MovePolicy = field(default_factory=MovePolicy)
    transfer: TransferPolicy = field(default_factory=TransferPolicy)
    mode: str = "partition"
    """partition: any study may use any host's bubbles. own: only studies of the host's user, and where a user has
    several, they share as if one coordinator placed them all (in the product each has its own)."""
    eager_transfer: bool = False
    """Not in the product yet: off, so that the simulator promises nothing that does not run."""

    def __post_init__(self) -> None:
        _check(self.mode in ("partition", "own"), f"policy.mode must be partition or own, got {self.mode!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """Everything that a run needs. Equal scenarios and seeds give equal results, to the byte."""

    name: str = "scenario"
    description: str = ""
    seed: int = 0
    until_h: float = 0.0
    """End after so many hours; 0: when everything has ended."""
    assumptions: tuple[str, ...] = ()
    """What the report says about where the numbers come from."""
    partitions: tuple[PartitionConfig, ...] = (PartitionConfig(),)
    trace: TraceConfig = field(default_factory=TraceConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    bubbles: BubbleConfig = field(default_factory=BubbleConfig)
    overheads: OverheadConfig = field(default_factory=OverheadConfig)
    failures: FailureConfig = field(default_factory=FailureConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    users: tuple[UserConfig, ...] = ()
    hosts: tuple[HostConfig, ...] = ()
    studies: tuple[StudyConfig, ...] = ()
    variants: dict[str, dict[str, object]] = field(default_factory=dict)
    """For `compare`: settings by dotted name that differ from the scenario, by the variant's name."""
    sweeps: dict[str, dict[str, tuple[object, ...]]] = field(default_factory=dict)
    """For `sweep`: values by dotted name, by the sweep's name; the report plots one line per sweep."""

    def __post_init__(self) -> None:
        _check(bool(self.partitions), "a scenario needs a partition")
        names = [partition.name for partition in self.partitions]
        _check(len(names) == len(set(names)), f"partitions of the same name: {', '.join(names)}")
        for what, called in (("hosts", [h.name for h in self.hosts]), ("studies", [s.name for s in self.studies])):
            twice = sorted({name for name in called if called.count(name) > 1})
            _check(not twice, f"{what} of the same name: {', '.join(twice)}; give each [[{what}]] its own name")
        groups = [(host.name, host.partition) for host in self.hosts]
        groups += [(study.name, study.partition) for study in self.studies]
        for name, partition in groups:
            _check(
                partition in ("", *names),
                f"{name!r} asks for partition {partition!r}; there are {', '.join(names)}",
            )
        _check(self.until_h >= 0, "until_h must be 0 or more")
