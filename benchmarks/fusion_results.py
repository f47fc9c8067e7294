"""What the fusion benchmark makes of its measurements: the planner's choice, claims, and rows of the table.

Rounds with even numbers choose, those with odd numbers say how good the choice was: else noise would flatter it. F are
measured one after the other, and machines slow down meanwhile: they are compared by their speed against one plain
trial, which is measured beside each.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from harness import Claim, bootstrap_ci, claim

from hydro_trials.fusion.program import COMPILED, FAST, GENERAL, SEPARATE
from hydro_trials.planner import knee

PLAIN, AGAIN, PROCESSES, TARGET = "plain", "separate again", "processes", "target"
"""One trial with torch.optim; a second, independent series of separate steps; trials with torch.optim in many
processes; one plain trial of the unscaled model."""
FUSED_KINDS = (GENERAL, FAST, COMPILED)
MIB = 2**20


@dataclass(frozen=True)
class Point:
    """How one way of running F lanes did."""

    kind: str
    lanes: int
    lane_steps_per_s: float
    bytes: int
    """Peak memory of the lanes."""


def choose(points: Sequence[Point]) -> Point:
    """The planner's choice: F at the knee, and what is fastest there."""
    lanes = knee(points)
    return max((point for point in points if point.lanes == lanes), key=lambda point: point.lane_steps_per_s)


@dataclass
class Cell:
    """Measurements of one F."""

    lanes: int
    rates: dict[str, list[float]]
    """Lane-steps per second in each round, by way."""
    peaks: dict[str, int]
    """Bytes, by way."""

    @property
    def kinds(self) -> list[str]:
        """The engine's own ways that were measured here."""
        return [kind for kind in (SEPARATE, *FUSED_KINDS) if kind in self.rates]

    def chosen_by(self, kind: str) -> float:
        """Speed against one plain trial, in the rounds that choose."""
        return statistics.median(a / b for a, b in zip(self.rates[kind][::2], self.rates[PLAIN][::2], strict=True))

    def ratios(self, kind: str, base: str) -> list[float]:
        """Speed against another way in the rounds that judge."""
        return [a / b for a, b in zip(self.rates[kind][1::2], self.rates[base][1::2], strict=True)]

    def predict_round_s(self, lanes: int) -> float:
        """Seconds that every way needs for one step of more lanes, if its lane-steps per second stay."""
        num_lanes = {way: 1 if way in (PLAIN, PROCESSES, TARGET) else lanes for way in self.rates}
        return sum(num / statistics.median(self.rates[way]) for way, num in num_lanes.items())

    @property
    def best_fused(self) -> str | None:
        """The fastest way that fuses; None where nothing can be fused."""
        kinds = [kind for kind in self.kinds if kind != SEPARATE]
        return max(kinds, key=self.chosen_by) if kinds else None


@dataclass
class Series:
    """All F of one model at one S."""

    model: str
    scale: int
    num_processes: int
    cells: list[Cell] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was not measured, and why."""

    def choice(self) -> tuple[Cell, str]:
        """The planner's F and way."""
        plain_rate = statistics.median(rate for cell in self.cells for rate in cell.rates[PLAIN])
        points = [
            Point(kind, cell.lanes, cell.chosen_by(kind) * plain_rate, cell.peaks[kind])
            for cell in self.cells
            for kind in cell.kinds
        ]
        chosen = choose(points)
        return next(cell for cell in self.cells if cell.lanes == chosen.lanes), chosen.kind


def claims_of(series: Series, device: str) -> Iterator[Claim]:
    """Every claim of one model at one S.

    `over_processes` compares per core on a CPU (fused lanes use one, the processes one each), on a GPU per device.
    """
    prefix = "cpu" if device == "cpu" else "gpu"
    where = f"{series.model}.s{series.scale}"
    cell, kind = series.choice()
    planner = f"{prefix}.planner.{where}"
    base = AGAIN if kind == SEPARATE else SEPARATE
    yield _ratio(f"{planner}.ratio", cell.ratios(kind, base), goal=1.0 if device == "cpu" else None)
    yield _ratio(f"{planner}.over_plain", cell.ratios(kind, PLAIN))
    share = series.num_processes if device == "cpu" else 1
    yield _ratio(f"{planner}.over_processes", [share * ratio for ratio in cell.ratios(kind, PROCESSES)])
    for each in series.cells:
        if each.best_fused is not None:
            yield _ratio(f"{prefix}.{where}.f{each.lanes}.ratio", each.ratios(each.best_fused, SEPARATE))
            if (series.model, series.scale, each.lanes, device) == ("mlp", 1, 64, "cpu"):
                yield _ratio("cpu.mlp.f64.ratio", each.ratios(each.best_fused, SEPARATE), goal=2.5)
    if TARGET in cell.rates:
        is_headline = where == "resnet18.s8"
        yield _ratio(f"{prefix}.{where}.ratio", cell.ratios(kind, TARGET), goal=25.0 if is_headline else None)
        if is_headline:
            yield _at_100_lanes(series, cell, kind, prefix)
    if GENERAL in cell.rates and FAST in cell.rates:
        yield _ratio(f"{prefix}.{where}.general_over_fast", cell.ratios(GENERAL, FAST))


def memory_claim(series: Series) -> Claim | None:
    """Peak memory of the general path against the fast path's, at the largest F of both; None without a fast path."""
    both = [cell for cell in series.cells if GENERAL in cell.peaks and FAST in cell.peaks]
    if not both:
        return None
    peaks = both[-1].peaks
    return Claim(
        f"memory.{series.model}.general_over_fast", peaks[GENERAL] / max(1, peaks[FAST]), "x", 1.5, "lower", None, 1
    )


def _ratio(name: str, samples: Sequence[float], goal: float | None = None) -> Claim:
    return claim(name, samples, unit="x", better="higher", goal=goal)


def _at_100_lanes(series: Series, chosen: Cell, kind: str, prefix: str) -> Claim:
    few = [(cell, way) for cell in series.cells if cell.lanes <= 100 for way in cell.kinds]
    cell, way = max(few, key=lambda pair: pair[0].chosen_by(pair[1]))
    samples = [a / b for a, b in zip(cell.ratios(way, PLAIN), chosen.ratios(kind, PLAIN), strict=False)]
    return _ratio(f"{prefix}.{series.model}.s{series.scale}.at_100_lanes", samples, goal=0.9)


def table(series: Series) -> str:
    """One line per F: speeds, the best fused way against separate steps, memory per lane, and the planner's choice."""
    chosen, kind = series.choice()
    lines = []
    for cell in series.cells:
        speeds = [_speed(cell, way) for way in (PLAIN, SEPARATE, *FUSED_KINDS, PROCESSES)]
        memory = [_mib(cell, way) for way in (PLAIN, SEPARATE, *FUSED_KINDS)]
        mark = ""
        if cell is chosen:
            mark = "planner: falls back to separate steps" if kind == SEPARATE else f"planner: {kind}"
        cells = [
            f"{series.model:<12}{series.scale:>3}{cell.lanes:>5}",
            *(f"{text:>10}" for text in speeds),
            f"{_interval(cell):>24}",
            *(f"{text:>9}" for text in memory),
        ]
        lines.append(f"{''.join(cells)}  {mark}".rstrip())
    return "\n".join([*lines, *(f"{series.model} s{series.scale}: {note}" for note in series.notes)])


def heading() -> str:
    """What stands above the lines of `table`."""
    ways = (PLAIN, SEPARATE, *FUSED_KINDS)
    above = f"{'':20}{'lane-steps per second':<60}{'best fused / separate':>24}  {'peak MiB per lane'}"
    names = [f"{'model':<12}{'S':>3}{'F':>5}", *(f"{name:>10}" for name in (*ways, PROCESSES))]
    return above + "\n" + "".join([*names, f"{'(95 % interval)':>24}", *(f"{name:>9}" for name in ways)])


def _speed(cell: Cell, way: str) -> str:
    return f"{statistics.median(cell.rates[way]):.4g}" if way in cell.rates else "-"


def _mib(cell: Cell, way: str) -> str:
    lanes = 1 if way == PLAIN else cell.lanes
    return f"{cell.peaks[way] / lanes / MIB:.3g}" if way in cell.peaks else "-"


def _interval(cell: Cell) -> str:
    if cell.best_fused is None:
        return "-"
    samples = cell.ratios(cell.best_fused, SEPARATE)
    low, high = bootstrap_ci(samples)
    return f"{statistics.median(samples):.2f} ({low:.2f} .. {high:.2f})"
