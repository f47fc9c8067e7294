"""What all benchmarks share: claims and their confidence intervals, the machine, the document, the table."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Statistic = Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Claim:
    """One measured figure. Names are stable: others compare them between versions."""

    name: str
    value: float
    unit: str
    goal: float | None
    """What is aimed at; null where there is nothing to aim at. Not a judgement: a benchmark never fails by it."""
    better: str
    """lower or higher."""
    ci95: tuple[float, float] | None
    n: int
    """Number of samples behind the value."""


def claim(
    name: str,
    samples: Sequence[float],
    statistic: Statistic = statistics.median,
    *,
    unit: str,
    better: str,
    goal: float | None = None,
) -> Claim:
    """A statistic of samples, with its bootstrap interval."""
    return Claim(name, statistic(samples), unit, goal, better, bootstrap_ci(samples, statistic), len(samples))


def percentile(share: float) -> Statistic:
    """Nearest-rank percentile as a statistic: `percentile(0.99)`."""

    def of(samples: Sequence[float]) -> float:
        ordered = sorted(samples)
        return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]

    return of


def bootstrap_ci(
    samples: Sequence[float],
    statistic: Statistic = statistics.median,
    *,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of independent samples; the same for the same samples."""
    generator = random.Random(seed)
    found = sorted(statistic(generator.choices(samples, k=len(samples))) for _ in range(num_resamples))
    tail = (1 - confidence) / 2
    return found[int(tail * num_resamples)], found[min(num_resamples - 1, int((1 - tail) * num_resamples))]


def machine() -> dict[str, Any]:
    """What the figures depend on, without saying whose machine it is."""
    cpu_info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in cpu_info if line.startswith("model name")), "unknown")
    memory_kib = int(Path("/proc/meminfo").read_text().split(maxsplit=2)[1])
    return {
        "cpu": model,
        "num_cpus": len(os.sched_getaffinity(0)),
        "memory_mib": memory_kib // 1024,
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def write_claims(path: Path, claims: Sequence[Claim]) -> None:
    """Write the document of a benchmark and print it as a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine(), "claims": [asdict(each) for each in claims]}
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(table(claims))


def table(claims: Sequence[Claim]) -> str:
    """The claims as text, one line each."""
    rows = [("claim", "value", "95 % interval", "unit", "goal", "n")]
    for each in claims:
        interval = "" if each.ci95 is None else f"{_short(each.ci95[0])} .. {_short(each.ci95[1])}"
        sign = "<=" if each.better == "lower" else ">="
        goal = "" if each.goal is None else f"{sign} {_short(each.goal)}"
        rows.append((each.name, _short(each.value), interval, each.unit, goal, str(each.n)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        cells[0], cells[3] = row[0].ljust(widths[0]), row[3].ljust(widths[3])
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _short(number: float) -> str:
    return f"{number:.4g}" if abs(number) < 10_000 else f"{number:,.0f}"
