"""How many trials one bundle fuses on one slot."""

from __future__ import annotations

from dataclasses import dataclass

from hydro_slurm.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class SizingPolicy:
    """Limits on the fusion count."""

    max_lanes: int
    """Largest fusion count, from the study's profile or its author."""
    lane_bytes: int = 0
    """Memory that one lane adds, in bytes; 0 while nothing has been measured."""
    memory_share: float = 0.8
    """Part of a slot's free memory that a bundle may plan with."""

    def __post_init__(self) -> None:
        if self.max_lanes < 1:
            raise ConfigError(f"max_lanes must be at least 1, got {self.max_lanes}")
        if not 0 < self.memory_share <= 1:
            raise ConfigError(f"memory_share must lie in (0, 1], got {self.memory_share}")


def fusion_count(num_waiting: int, num_slots: int, free_bytes: int, sizing: SizingPolicy) -> int:
    """Lanes for a new bundle on one slot.

    Waiting trials are spread evenly over the free slots before bundles grow: two half-full bundles finish earlier
    than a full one beside an idle slot.

    Args:
        num_waiting: Trials that wait for a lane.
        num_slots: Slots that share them, this one included; at least 1.
        free_bytes: Free memory on the slot's device; 0 if it is not known.
        sizing: The limits.

    Returns:
        0 if not even one lane fits, else a count from 1 to `sizing.max_lanes`.
    """
    share = -(-num_waiting // max(num_slots, 1))
    count = min(share, sizing.max_lanes)
    if sizing.lane_bytes and free_bytes:
        count = min(count, int(free_bytes * sizing.memory_share) // sizing.lane_bytes)
    return max(count, 0)
