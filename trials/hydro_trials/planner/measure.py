"""Times steps of a trainer, and the quanta that they are cut into."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from hydro_trials.fusion import FusedTrainer
from hydro_trials.fusion.program import Check

NUM_WARM_UP = 2
MIN_STEPS, MAX_STEPS = 3, 40
ROUND_S = 0.15
"""Aim of one round of steps, in seconds."""


class QuantumMeter:
    """A check that hands on to another and notes the time between two boundaries.

    Args:
        check: The gate's; what it waits is no part of a quantum.
        synchronize: Waits for the device.
    """

    def __init__(self, check: Check, synchronize: Callable[[], object]) -> None:
        self._check, self._synchronize = check, synchronize
        self._now_ns = _clock()
        self.quanta_ns: list[int] = []
        self.compute_ns = 0
        self._began_ns = self._now_ns()

    def check(self, site: int) -> None:
        """A boundary."""
        self._end()
        self._check(site)
        self._began_ns = self._now_ns()

    def begin(self) -> None:
        """What was done since the last boundary was no step."""
        self._began_ns = self._now_ns()

    def end(self) -> None:
        """The step is over."""
        self._end()
        self._began_ns = self._now_ns()

    def _end(self) -> None:
        self._synchronize()
        elapsed_ns = self._now_ns() - self._began_ns
        self.quanta_ns.append(elapsed_ns)
        self.compute_ns += elapsed_ns

    def p99_us(self) -> float:
        """99th percentile of the quanta so far, in microseconds."""
        ordered = sorted(self.quanta_ns)
        return ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))] / 1e3 if ordered else 0.0


@dataclass
class Series:
    """Steps of one way of running lanes, measured round by round."""

    kind: str
    depth: int | None
    step_ms: list[float] = field(default_factory=list)
    quantum_p99_us: float = 0.0

    @property
    def median_ms(self) -> float:
        return statistics.median(self.step_ms)


def run_round(trainer: FusedTrainer, series: Series, check: Check) -> None:
    """Time some steps, run the way that `series` says; computing time only, not what a gate makes them wait."""
    trainer.use(series.kind, depth=series.depth)
    meter = QuantumMeter(check, synchronizer(trainer.device))
    trainer.set_check(meter.check)
    for _ in range(NUM_WARM_UP if not series.step_ms else 1):
        trainer.step()
    meter.quanta_ns.clear()
    total_s = 0.0
    for count in range(MAX_STEPS):
        meter.begin()
        before_ns = meter.compute_ns
        trainer.step()
        meter.end()
        step_s = (meter.compute_ns - before_ns) / 1e9
        series.step_ms.append(step_s * 1e3)
        total_s += step_s
        if count + 1 >= MIN_STEPS and total_s >= ROUND_S:
            break
    series.quantum_p99_us = max(series.quantum_p99_us, meter.p99_us())
    trainer.set_check(check)


def _clock() -> Callable[[], int]:
    """The thread's own CPU time where that is what computing takes: others on the CPU then leave no trace."""
    if torch.cuda.is_available() or torch.get_num_threads() > 1:
        return time.perf_counter_ns
    return time.thread_time_ns


def synchronizer(device: torch.device) -> Callable[[], object]:
    """Waits until a device has done what it was given."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
