"""Profiles a study's lanes at rising fusion counts, and finds the knee.

Every way of running lanes is measured at every fusion count, interleaved, on this device, on the study's own model and
data; nothing is assumed. A way that is refused (the model cannot be run so, or gives other numbers than the general
path) or that has fallen far behind is not measured further. Running out of memory halves the fusion count and ends the
rise: what was measured before stands.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hydro_slurm.errors import FusionError, PlannerError
from hydro_slurm.model import Profile, ProfilePoint
from hydro_trials.fusion import FusedTrainer
from hydro_trials.fusion.program import COMPILED, FAST, GENERAL, SEPARATE
from hydro_trials.hyperparameters import used_hyperparameters
from hydro_trials.planner.choice import KNEE_SHARE, knee, memory_line
from hydro_trials.planner.measure import Series, run_round
from hydro_trials.planner.memory import is_out_of_memory, peak_bytes, reset_peak
from hydro_trials.runtime.sample_lanes import fill_trainer

logger = logging.getLogger(__name__)

NUM_ROUNDS = 3
LEFT_BEHIND = 1.5
"""A way that takes this many times as long as the best is not measured at larger fusion counts."""
PROBE_LANES = 2


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a bundle has to keep to."""

    max_lanes: int = 64
    cap_bytes: int | None = None
    """The process's memory, all of it; on a GPU, on the device."""
    quantum_ms: float | None = None
    """Longest time between two boundaries that fits the bubbles (99th percentile)."""
    budget_s: float = 60.0
    """Computing time for measuring (the process's own, so that a busy machine does not cut it short); at least one
    fusion count is measured."""
    factor: int = 2
    """How many times the one before each fusion count is."""
    num_steps: int = 0
    """Steps that will be run as planned: compiling is kept only if it pays within them. 0 does not try it."""


class Profiler:
    """Measures one study at one width on one device.

    Args:
        make_trainer: Makes an empty trainer.
        limits: What to keep to.
    """

    def __init__(self, make_trainer: Callable[[], FusedTrainer], limits: Limits) -> None:
        self.limits = limits
        self._make_trainer = make_trainer
        self._refused: dict[str, str] = {}
        self._stopped = ""
        self._is_cut_short = False
        self._state_bytes = 0
        self._deadline_s = 0.0
        self._setup_s: dict[tuple[str, int], float] = {}

    def run(self, lanes: Sequence[int] | None = None) -> Profile:
        """Measure, at the given fusion counts or at 1, 2, 4, … up to the limit.

        Raises:
            PlannerError: Not even one lane keeps to the limits.
        """
        self._deadline_s = time.process_time() + self.limits.budget_s
        trainer = self._make_trainer()
        reset_peak(trainer.device)
        base_bytes = peak_bytes(trainer.device)
        check = trainer.check
        try:
            kinds = self._usable_kinds(trainer)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            trainer, kinds = self._make_trainer(), [GENERAL, SEPARATE]  # tried with fewer lanes below
        points: list[ProfilePoint] = []
        others: list[ProfilePoint] = []
        counts = deque(lanes or self._counts())
        while counts:
            count = counts.popleft()
            try:
                fill_trainer(trainer, count)
                measured = self._measure(trainer, kinds)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                trainer = self._make_trainer()  # the old one may be torn
                self._stopped = f"out of memory with {count} lanes"
                smaller = count // 2
                counts = deque([smaller] if smaller and all(point.lanes < smaller for point in points) else [])
                continue
            fitting = [point for point in measured if self._keeps_to_limits(point)]
            if not fitting:
                break
            if not self._stopped.startswith("out of memory"):
                self._stopped = ""  # one way did not keep to the limits, another does
            best = min(fitting, key=self._cost_ms)
            points.append(best)
            self._state_bytes = trainer.state_bytes() // count
            others += [point for point in measured if point is not best]
            slow = {p.kind for p in measured if p.step_ms > LEFT_BEHIND * best.step_ms}
            kinds = [kind for kind in kinds if kind not in slow] or [best.kind]
            if lanes is None and self._is_past_knee(points):
                self._stopped = f"{count} lanes are no faster than {knee(points)}"
                break
            if counts and time.process_time() > self._deadline_s:
                self._stopped = f"{self.limits.budget_s:g} s of measuring are over"
                self._is_cut_short = True
                break
        trainer.drop(trainer.trials)
        trainer.set_check(check)
        if not points:
            raise PlannerError(f"study {trainer.study.name!r}: not even one lane fits: {self._stopped}")
        return self._profile(trainer, points, others, base_bytes)

    def _counts(self) -> list[int]:
        counts = [1]
        while counts[-1] * self.limits.factor <= self.limits.max_lanes:
            counts.append(counts[-1] * self.limits.factor)
        return counts if counts[-1] == self.limits.max_lanes else [*counts, self.limits.max_lanes]

    def _usable_kinds(self, trainer: FusedTrainer) -> list[str]:
        """Ways that this model can be run, tried on a few lanes and compared with each other."""
        fill_trainer(trainer, min(PROBE_LANES, self.limits.max_lanes))
        trainer.step()
        if trainer.refusal is not None:
            self._refused[GENERAL] = str(trainer.refusal)
            return [SEPARATE]
        kinds = [GENERAL, FAST, *([COMPILED] if self.limits.num_steps else [])]
        usable = []
        for kind in kinds:
            try:
                if kind != GENERAL:
                    trainer.compare(kind)
                usable.append(kind)
            except FusionError as error:
                self._refused[kind] = str(error)
        trainer.use(GENERAL)
        return [*usable, SEPARATE]

    def _measure(self, trainer: FusedTrainer, kinds: Sequence[str]) -> list[ProfilePoint]:
        """One point per way, at the trainer's present fusion count."""
        check = trainer.check
        series = [self._divided(trainer, kind) for kind in kinds]
        for _ in range(NUM_ROUNDS - 1):
            for one in series:
                if time.process_time() < self._deadline_s:
                    run_round(trainer, one, check)
        count = len(trainer.lanes)
        points = []
        for one in series:
            reset_peak(trainer.device)
            trainer.use(one.kind, depth=one.depth)
            trainer.step()
            points.append(
                ProfilePoint(
                    lanes=count,
                    kind=one.kind,
                    depth=one.depth,
                    step_ms=round(one.median_ms, 4),
                    lane_steps_per_s=round(count / one.median_ms * 1e3, 2),
                    quantum_p99_us=round(one.quantum_p99_us, 1),
                    peak_bytes=peak_bytes(trainer.device),
                )
            )
        return points

    def _divided(self, trainer: FusedTrainer, kind: str) -> Series:
        """The first round of a way, its steps cut no finer than the quantum needs; everywhere where none is asked."""
        check = trainer.check
        depths: list[int | None] = [None]
        if self.limits.quantum_ms is not None:
            deepest = max(name.count(".") + 1 for name, _ in trainer.new_module().named_modules())
            depths = [*range(deepest + 1), None]
        for depth in depths:
            series = Series(kind, depth)
            began_s = time.monotonic()
            trainer.use(kind, depth=depth)
            trainer.step()
            self._setup_s[kind, len(trainer.lanes)] = time.monotonic() - began_s
            run_round(trainer, series, check)
            if self.limits.quantum_ms is None or series.quantum_p99_us <= self.limits.quantum_ms * 1e3:
                break
        return series

    def _cost_ms(self, point: ProfilePoint) -> float:
        """Duration of a step, its share of the time for compiling included."""
        setup_s = self._setup_s.get((point.kind, point.lanes), 0.0) if point.kind == COMPILED else 0.0
        return point.step_ms + setup_s * 1e3 / max(1, self.limits.num_steps)

    def _keeps_to_limits(self, point: ProfilePoint) -> bool:
        limits = self.limits
        if limits.cap_bytes is not None and point.peak_bytes > limits.cap_bytes:
            self._stopped = f"{point.lanes} lanes take {point.peak_bytes} bytes, the cap is {limits.cap_bytes}"
            return False
        if limits.quantum_ms is not None and point.quantum_p99_us > limits.quantum_ms * 1e3:
            self._stopped = (
                f"with {point.lanes} lanes an operation takes {point.quantum_p99_us / 1e3:.2f} ms, the quantum is "
                f"{limits.quantum_ms:g} ms"
            )
            return False
        return True

    @staticmethod
    def _is_past_knee(points: Sequence[ProfilePoint]) -> bool:
        """Whether the last two doublings brought nothing."""
        rates = [point.lane_steps_per_s for point in points]
        return len(rates) > 2 and max(rates[-2:]) * KNEE_SHARE < max(rates[:-2])

    def _profile(
        self, trainer: FusedTrainer, points: list[ProfilePoint], others: list[ProfilePoint], base_bytes: int
    ) -> Profile:
        study = trainer.study
        return Profile(
            key=profile_key(trainer),
            study=study.name,
            width_scale=float(trainer.surrogate.width_scale),
            batch_size=study.batch_size,
            dtype=_dtype(trainer),
            device=device_name(trainer.device),
            num_threads=torch.get_num_threads(),
            points=tuple(points),
            others=tuple(others),
            refused=self._refused,
            knee_lanes=0 if self._is_cut_short else knee(points),
            base_bytes=base_bytes,
            lane_bytes=max(self._state_bytes, memory_line(points)),
            stopped=self._stopped,
        )


def profile_key(trainer: FusedTrainer) -> str:
    """What a profile depends on, as a short hash: model, optimizer, S, batch, type, device, threads, torch."""
    study = trainer.study
    shapes = [(name, tuple(p.shape)) for name, p in trainer.new_module().named_parameters()]
    modules = [type(module).__name__ for module in trainer.new_module().modules()]
    samples = [tuple(leaf.shape[1:]) for leaf in torch.utils._pytree.tree_leaves(trainer.data.train)]
    settings = (
        study.optimizer,
        study.batch_size,
        study.accumulate,
        study.data_order,
        float(trainer.surrogate.width_scale),
    )
    names = sorted(used_hyperparameters(study.optimizer, study.fixed, study.space))
    machine = (device_name(trainer.device), torch.get_num_threads(), torch.__version__)
    identity = repr((shapes, modules, samples, settings, names, _dtype(trainer), machine))
    return hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()


def device_name(device: torch.device) -> str:
    """The device's own name: the GPU's, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return "cpu"


def _dtype(trainer: FusedTrainer) -> str:
    precision = trainer.study.precision
    name = str(trainer.layout.dtype).removeprefix("torch.")
    return name if precision == "full" else f"{name}+{precision}"
