"""Ways of training F lanes of one model, how fast they are, and how much memory they take.

Shape suffixes: F = lanes.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_map

from hydro_slurm.errors import FusionError
from hydro_trials.fusion import FusedTrainer
from hydro_trials.fusion.streams import SampleStream
from hydro_trials.hyperparameters import resolve_hyperparameters
from hydro_trials.samples import num_samples, take
from hydro_trials.study import Data, Study
from hydro_trials.surrogate import Surrogate

T = TypeVar("T")

WARM_UP_STEPS = 2
SAMPLE_S = 0.05
"""A timed sample holds as many steps as fill this."""


@dataclass(frozen=True)
class Subject:
    """What is trained, and where."""

    study: Study
    surrogate: Surrogate
    data: Data
    device: str

    def lr(self, lane: int) -> float:
        """Lanes differ a little, so that none is another's copy."""
        low, high = self.study.space["lr"].low, self.study.space["lr"].high
        return float((low * high) ** 0.5 / (1 + lane / 16))

    def values(self, lane: int) -> dict[str, float]:
        """A lane's complete hyperparameters."""
        study = self.study
        return resolve_hyperparameters(study.optimizer, study.schedule, study.fixed, {"lr": self.lr(lane)})


class Way(Protocol):
    """One way of training some lanes."""

    def rate(self, num_steps: int) -> float:
        """Lane-steps per second over this many steps."""
        ...


class Stepped:
    """A way that has a step, timed from a quiet device to a quiet device."""

    def __init__(self, device: str, num_lanes: int, step: Callable[[], None]) -> None:
        self._device, self._num_lanes, self.step = device, num_lanes, step

    def rate(self, num_steps: int) -> float:
        """See `Way`."""
        synchronise(self._device)
        began_s = time.perf_counter()
        for _ in range(num_steps):
            self.step()
        synchronise(self._device)
        return self._num_lanes * num_steps / (time.perf_counter() - began_s)


def plain(subject: Subject) -> Stepped:
    """One trial as anyone would run it: a plain module and torch.optim, no lanes."""
    study, device = subject.study, subject.device
    data = tree_map(lambda tensor: tensor.to(device), subject.data.train)
    stream = SampleStream(study.seed, num_samples(data[0]), study.batch_size)
    module = subject.surrogate.make(0).to(device).train()
    optimizer = _torch_optimizer(study.optimizer, module, subject.values(0))
    num_done = 0

    def step() -> None:
        nonlocal num_done
        x, y = take(data, stream.indices(num_done).to(device))
        optimizer.zero_grad()
        study.loss(module(x), y).backward()
        optimizer.step()
        num_done += 1

    return Stepped(device, 1, step)


def _torch_optimizer(name: str, module: nn.Module, values: Mapping[str, float]) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(module.parameters(), lr=values["lr"], momentum=values["momentum"])
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind(module.parameters(), lr=values["lr"], weight_decay=values["weight_decay"])


def fused(subject: Subject, num_lanes: int, kind: str) -> Stepped:
    """One FusedTrainer running its lanes one way.

    Raises:
        FusionError: The model cannot be run that way.
    """
    trainer = FusedTrainer(
        subject.study,
        subject.surrogate,
        subject.data,
        subject.study.steps,
        lambda site: None,
        kind=kind,
        device=subject.device,
    )
    for lane in range(num_lanes):
        trainer.admit(lane, lane, subject.values(lane))

    def step() -> None:
        trainer.step()
        if trainer.refusal is not None:
            raise FusionError(str(trainer.refusal))

    return Stepped(subject.device, num_lanes, step)


class Processes:
    """One plain trial in each of several processes, all at once, each pinned to a core of its own."""

    def __init__(self, subject: Subject, cores: Sequence[int]) -> None:
        context = multiprocessing.get_context("fork")
        self._connections: list[Connection] = []
        self._processes = []
        for core in cores:
            ours, theirs = context.Pipe()
            self._connections.append(ours)
            # A fork holds copies of our ends; it must drop them, or the one before it would not notice our death.
            arguments = (theirs, list(self._connections), subject, core)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)

    def rate(self, num_steps: int) -> float:
        """See `Way`; all processes together."""
        for connection in self._connections:
            connection.send(num_steps)
        return sum(connection.recv() for connection in self._connections)

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join()


def _serve(connection: Connection, others: Sequence[Connection], subject: Subject, core: int) -> None:
    for other in others:
        other.close()
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    way = plain(subject)
    try:
        while True:
            connection.send(way.rate(connection.recv()))
    except EOFError:
        return


def synchronise(device: str) -> None:
    """Wait until the device has nothing left to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def time_ways(ways: Mapping[str, Way], *, seconds: float, min_rounds: int, max_rounds: int) -> dict[str, list[float]]:
    """Lane-steps per second of each way, once per round, in turns whose order rotates."""
    num_steps = {}
    for name, way in ways.items():
        way.rate(WARM_UP_STEPS)
        began_s = time.perf_counter()
        way.rate(1)
        num_steps[name] = max(1, round(SAMPLE_S / (time.perf_counter() - began_s)))
    rates: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    began_s = time.perf_counter()
    num_rounds = 0
    while num_rounds < max_rounds:
        if num_rounds >= min_rounds and (time.perf_counter() - began_s) * (1 + 1 / num_rounds) > seconds:
            break
        first = num_rounds % len(names)
        for name in names[first:] + names[:first]:
            rates[name].append(ways[name].rate(num_steps[name]))
        num_rounds += 1
    return rates


def peak_bytes(make: Callable[[int], Stepped], num_lanes: int, device: str) -> int:
    """Most memory that making this many lanes and stepping them takes, beyond what was in use before.

    On a CPU, of a process forked for this. It first trains one lane and forgets it, so that neither torch's own pages
    nor what it allocates once and for all count.
    """

    def steps(num_lanes: int) -> None:
        way = make(num_lanes)
        way.rate(WARM_UP_STEPS + 1)

    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        steps(num_lanes)
        return torch.cuda.max_memory_allocated() - before

    def measure() -> int:
        steps(1)
        release_memory()
        before = _status_bytes("VmRSS")
        steps(num_lanes)
        return _status_bytes("VmHWM") - before

    release_memory()
    return in_child(measure)


def release_memory() -> None:
    """Give freed memory back to the system, so that taking it again is seen."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def in_child(work: Callable[[], T]) -> T:
    """The result of `work`, run in a forked process.

    Raises:
        RuntimeError: It raised (with its traceback), or the process died.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, work))
    process.start()
    theirs.close()
    try:
        result, error = ours.recv()
    except EOFError:
        result, error = None, "it died without a word; out of memory?"
    process.join()
    if error is not None:
        raise RuntimeError(f"the measuring process failed: {error}")
    return result


def _answer(connection: Connection, work: Callable[[], Any]) -> None:
    try:
        connection.send((work(), None))
    except Exception:
        connection.send((None, traceback.format_exc()))
