"""Which jobs qualify as hosts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class HostOffer:
    """A job that may share its bubbles, as Slurm and its slot reports describe it."""

    shares: bool
    """It offers itself, by its comment or its SPANK option."""
    has_live_gates: bool
    num_stages: int
    age_s: float
    time_left_s: float | None
    """Until its time limit; None if it has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostPolicy:
    """What a host needs before bundles come."""

    min_stages: int = 2
    """A pipeline of one stage has no bubbles."""
    min_age_s: float = 60.0
    """Jobs that fail in their first minute are no hosts."""
    min_time_left_s: float = 300.0
    """A bundle takes a while to start, and more to have a result."""


def why_not(offer: HostOffer, policy: HostPolicy) -> str:
    """Why a job is no host; empty if it is one."""
    if not offer.shares:
        return "it does not offer its bubbles"
    if not offer.has_live_gates:
        return "it has no live gates"
    if offer.num_stages < policy.min_stages:
        return f"it has {offer.num_stages} stages, needed {policy.min_stages}"
    if offer.age_s < policy.min_age_s:
        return f"it has run for {offer.age_s:.0f} s, needed {policy.min_age_s:.0f} s"
    if offer.time_left_s is not None and offer.time_left_s < policy.min_time_left_s:
        return f"its time limit is {offer.time_left_s:.0f} s away, needed {policy.min_time_left_s:.0f} s"
    return ""
