"""Fair shares of the slots: weighted max-min of normalised throughput over device types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hydro_slurm.errors import ConfigError

_TOLERANCE = 1e-7


@dataclass(frozen=True, slots=True)
class Claim:
    """One study that wants slots."""

    weight: float
    max_slots: float
    """Most slots that it can use, or may."""
    relative_speed: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SlotClass:
    """Identical slots, as the solver sees them."""

    kind: str
    device_type: str
    speed: float
    """Device seconds per second of one slot."""
    count: int


def allocate(claims: Sequence[Claim], classes: Sequence[SlotClass]) -> list[list[float]]:
    """How many slots of each class each claim is entitled to; fractions are shares of time.

    Where all claims run equally well on every device type, the slots are shared by weight and what a claim cannot use
    goes to the others. Otherwise a linear program finds the shares: it maximises the smallest throughput, each
    relative to what its claim would get from its weight's share of every class, then the next smallest, then the sum.

    Returns:
        One row per claim, one column per class.

    Source: Gavel (OSDI 2020), sections 4.1 and 4.2: max-min fairness over effective throughput.
    """
    if not claims or not classes:
        return [[0.0] * len(classes) for _ in claims]
    types = {each.device_type for each in classes}
    ratios = {tuple(_speeds(claim, types)) for claim in claims}
    if len(ratios) == 1:
        total = sum(each.count for each in classes)
        shares = water_fill([(claim.weight, claim.max_slots) for claim in claims], total)
        return [[each.count * share / total if total else 0.0 for each in classes] for share in shares]
    return _solve(claims, classes)


def water_fill(claims: Sequence[tuple[float, float]], total: float) -> list[float]:
    """Share `total` by weight; what is above a claim's limit goes to the others.

    Args:
        claims: (weight, limit) of each.
        total: What there is.
    """
    shares = [0.0] * len(claims)
    open_claims = sorted(range(len(claims)), key=lambda i: (claims[i][1] / claims[i][0], i))
    weight = sum(claims[i][0] for i in open_claims)
    for index in open_claims:
        claim_weight, limit = claims[index]
        shares[index] = min(limit, total * claim_weight / weight)
        total -= shares[index]
        weight -= claim_weight
    return shares


def _speeds(claim: Claim, types: set[str]) -> list[float]:
    """Relative speeds over the types that there are, scaled to a largest of 1."""
    speeds = [claim.relative_speed.get(name, 1.0) for name in sorted(types)]
    largest = max(speeds)
    return [round(speed / largest, 6) for speed in speeds] if largest > 0 else speeds


def _solve(claims: Sequence[Claim], classes: Sequence[SlotClass]) -> list[list[float]]:
    """Lexicographic max-min by repeated linear programs: claims that cannot rise further are held where they are."""
    num_classes, size = len(classes), len(claims) * len(classes)
    total_weight = sum(claim.weight for claim in claims)
    gains: list[list[float]] = []
    for claim in claims:
        row = [claim.relative_speed.get(each.device_type, 1.0) * each.speed for each in classes]
        equal = sum(gain * each.count for gain, each in zip(row, classes, strict=True)) * claim.weight / total_weight
        gains.append([gain / equal if equal > 0 else 0.0 for gain in row])

    # Rows of A x <= b over x = (shares by claim and class, z).
    capacity = [[1.0 if i % num_classes == c else 0.0 for i in range(size)] + [0.0] for c in range(num_classes)]
    limits = [[1.0 if i // num_classes == k else 0.0 for i in range(size)] + [0.0] for k in range(len(claims))]
    bounds_right = [float(each.count) for each in classes] + [claim.max_slots for claim in claims]
    first_floor = len(bounds_right)
    held: dict[int, float] = {k: 0.0 for k, row in enumerate(gains) if not any(row) or claims[k].max_slots <= 0}
    while len(held) < len(claims):
        floors, right = _floor_rows(gains, held, size)
        solution, marginals = _linprog([0.0] * size + [-1.0], capacity + limits + floors, bounds_right + right)
        # A claim whose floor has a price is at its best in every optimum of this round: it is held there.
        tight = [k for k in range(len(claims)) if k not in held and marginals[first_floor + k] < -_TOLERANCE]
        for k in tight or [k for k in range(len(claims)) if k not in held]:
            held[k] = solution[size]
    floors, right = _floor_rows(gains, held, size)
    flat = [-gain for row in gains for gain in row]
    solution, _ = _linprog([*flat, 0.0], capacity + limits + floors, bounds_right + right)
    return [[max(solution[k * num_classes + c], 0.0) for c in range(num_classes)] for k in range(len(claims))]


def _floor_rows(
    gains: Sequence[Sequence[float]], held: Mapping[int, float], size: int
) -> tuple[list[list[float]], list[float]]:
    """Each claim's throughput is at least what it is held at, or z."""
    rows, right = [], []
    for k, row in enumerate(gains):
        line = [0.0] * (size + 1)
        for c, gain in enumerate(row):
            line[k * len(row) + c] = -gain
        if k not in held:
            line[size] = 1.0
        rows.append(line)
        right.append(-held[k] * (1 - _TOLERANCE) if k in held else 0.0)
    return rows, right


def _linprog(costs: list[float], rows: list[list[float]], right: list[float]) -> tuple[list[float], list[float]]:
    """Minimise over x >= 0. Returns x, and what each row's bound costs."""
    try:
        from scipy.optimize import linprog  # only clusters with several device types need it
    except ImportError:
        raise ConfigError(
            "sharing slots of several device types needs SciPy, which is not installed: pip install 'hydro-slurm[sim]'"
        ) from None
    found = linprog(costs, A_ub=rows, b_ub=right, bounds=(0, None), method="highs")
    assert found.status == 0, f"shares of slots: {found.message}"  # zero is feasible and counts bound it
    return [float(value) for value in found.x], [float(value) for value in found.ineqlin.marginals]
