"""What a decision is made of: slots, bundles and demands go in, launches, refills and finishes come out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hydro_slurm.errors import ConfigError
from hydro_slurm.policy.sizing import SizingPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """A device that bundles may use: in a host job's bubbles (kind "bubble") or alone (kind "own")."""

    id: str
    kind: str = "bubble"
    bubble_s_per_s: float = 1.0
    """Expected usable seconds per second; 1 for a device of its own."""
    free_bytes: int = 0
    shut: bool = False
    """The guard has shut the slot: nothing is placed there, what runs there leaves."""
    device_type: str = ""
    study: str = ""
    """Only this study may use it (an exclusive device of its allocation); empty: any study."""
    user: str = ""
    """Only this user's studies may use it (own mode: bubbles of his own hosts); empty: any user's."""
    time_left_s: float | None = None
    """When its host is due to end, in seconds from now; None if that is not known."""

    @property
    def is_shared(self) -> bool:
        """Whether studies of different users compete for it."""
        return not self.study and not self.user


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningBundle:
    """A bundle that holds a slot."""

    id: str
    slot_id: str
    purpose: str
    num_lanes: int
    num_waiting: int = 0
    """Trials handed to it that wait inside it for a free lane."""
    max_lanes: int = 1
    """Max fusion count; below `num_lanes` where its slot has lost the memory for them."""
    finishing: bool = False
    study: str = ""
    user: str = ""
    group: str = ""
    remaining_s: float | None = None
    """Expected seconds until its lanes have ended if it stays as it is; None if nobody knows: it is not moved then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """Trials that could start now, for one purpose ("search" or "verify") of one study."""

    purpose: str
    num_waiting: int
    sizing: SizingPolicy
    study: str = ""
    user: str = ""
    group: str = ""
    """Trials of different groups never share a bundle (their batch sizes differ, for example)."""
    promoted: bool = False
    """Promoted trials go to exclusive devices, and to bubbles only where their study has no exclusive one."""
    relative_speed: Mapping[str, float] = field(default_factory=dict)
    """Throughput by device type, relative to a reference type; 1 for a type that is not listed."""
    waited_s: float = 0.0
    """Seconds since this study last held a slot; the longest goes first among equals."""
    piece_s: float = 0.0
    """Seconds on a device of its own until a lane has its next result; a slot that goes earlier is of no use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UserShare:
    """What one user is entitled to, beside the others."""

    weight: float = 1.0
    """Fairshare weight: twice the weight is twice the share."""
    max_slots: int | None = None
    """Most slots that this user may hold at a time."""
    usage_s: float = 0.0
    """Slot-seconds used so far, decayed as the site likes: who has used less goes first among equals."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(f"a user's weight must be positive, got {self.weight}")
        if self.max_slots is not None and self.max_slots < 0:
            raise ConfigError(f"a user's max_slots must be 0 or more, got {self.max_slots}")


@dataclass(frozen=True, slots=True)
class Launch:
    """Start a bundle on a slot with this many lanes."""

    slot_id: str
    purpose: str
    num_lanes: int
    study: str = ""
    group: str = ""


@dataclass(frozen=True, slots=True)
class Refill:
    """Hand more trials to a running bundle."""

    bundle_id: str
    num_lanes: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Make a bundle checkpoint its lanes and leave; what it had not finished waits again and is placed anew."""

    bundle_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What one decision changes; empty when everything is as it should be."""

    launches: tuple[Launch, ...] = ()
    refills: tuple[Refill, ...] = ()
    finishes: tuple[Finish, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.launches or self.refills or self.finishes)
