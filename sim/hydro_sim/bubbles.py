"""What a host's bubbles are worth to a bundle: from the schedule, or from recorded timelines."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from hydro_sim.pipeline import lay_out
from hydro_sim.settings import BubbleConfig, HostConfig
from hydro_slurm.errors import FormatError, TraceError
from hydro_slurm.timeline import read_timeline

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class StageOffer:
    """What one device of a stage offers."""

    idle_share: float
    """Idle seconds per second, whatever their length."""
    usable_s_per_s: float
    """Of these, what remains of gaps that are long enough, less the margin: what a slot report says."""
    throughput_share: float
    """A bundle's throughput there, relative to a device of its own."""
    free_bytes: int
    source: str


def stage_offers(host: HostConfig, config: BubbleConfig, folder: Path) -> list[StageOffer]:
    """One offer per stage.

    Raises:
        TraceError: A recorded timeline cannot be read or holds no iteration.
    """
    if host.gaps_ms:
        measured = [(host.iteration_ms / 1e3, [gap / 1e3 for gap in host.gaps_ms])]
        source = "gaps that the scenario gives"
    elif host.timelines:
        measured = [recorded_gaps(folder / name) for name in host.timelines]
        source = "recorded timelines"
    else:
        iteration = lay_out(host.pipeline)
        measured = [(iteration.duration_s, list(stage.gaps_s)) for stage in iteration.stages]
        source = f"computed from the {host.pipeline.schedule} schedule"
    offers = []
    for stage, (duration_s, gaps_s) in enumerate(measured):
        margin_s = config.margin_ms / 1e3
        usable_s = sum(max(gap - margin_s, 0.0) for gap in gaps_s if gap >= config.min_gap_ms / 1e3)
        usable = usable_s / duration_s
        share = config.throughput_share or usable * config.efficiency
        free_bytes = round(host.free_gib[min(stage, len(host.free_gib) - 1)] * GIB) if host.free_gib else 0
        offers.append(StageOffer(sum(gaps_s) / duration_s, usable, share if usable > 0 else 0.0, free_bytes, source))
    return offers


def recorded_gaps(path: Path) -> tuple[float, list[float]]:
    """Length of an iteration and its gaps, of a timeline that a hook recorded: medians over its iterations.

    Only iterations without bundles count where some were held back (`control`), for a bundle's work is no gap.
    """
    try:
        _, events = read_timeline(path)
    except (OSError, FormatError) as error:
        raise TraceError(f"cannot take bubbles from a timeline: {error}") from None
    control = {event.iteration for event in events if event.kind == "control" and event.iteration is not None}
    gaps: dict[int, list[float]] = {}
    spans: dict[int, tuple[int, int]] = {}
    for event in events:
        if event.iteration is None or event.kind not in ("gap", "forward", "backward", "step"):
            continue
        begin, end = spans.get(event.iteration, (event.t_ns, event.end_ns))
        spans[event.iteration] = min(begin, event.t_ns), max(end, event.end_ns)
        if event.kind == "gap":
            gaps.setdefault(event.iteration, []).append(event.dur_ns / 1e9)
    chosen = sorted(control & set(gaps)) or sorted(gaps)
    if len(chosen) < 2:
        raise TraceError(f"{path}: got gaps of {len(chosen)} iterations, needed 2 or more")
    count = statistics.mode(len(gaps[number]) for number in chosen)
    alike = [gaps[number] for number in chosen if len(gaps[number]) == count]
    duration_s = statistics.median((spans[n][1] - spans[n][0]) / 1e9 for n in chosen)
    return duration_s, [statistics.median(each[position] for each in alike) for position in range(count)]
