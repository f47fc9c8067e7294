"""Pipeline schedules: when each stage computes, where its bubbles lie, and what memory it holds.

Every stage does its operations in the order that its schedule fixes, each as soon as the one before it on the stage
and the one that it needs from a neighbour are done. Communication takes no time of its own; it is part of the
durations.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache

from hydro_slurm.errors import ConfigError

SCHEDULES = ("1f1b", "gpipe", "interleaved", "zero-bubble")

FORWARD, BACKWARD, WEIGHT = "forward", "backward", "weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineSpec:
    """One iteration of a pipeline. Durations are those of one microbatch on one stage, in seconds."""

    num_stages: int
    num_microbatches: int
    schedule: str = "1f1b"
    forward_s: float = 1.0
    backward_s: float = 2.0
    """Of the whole backward pass: gradients of inputs and of weights."""
    weight_share: float = 0.5
    """Part of the backward pass that computes gradients of weights, which zero-bubble does later."""
    num_chunks: int = 2
    """Model chunks of each device in the interleaved schedule."""
    step_s: float = 0.0
    """Optimizer step at the end, on all stages at once."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"a pipeline's schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.num_stages < 1 or self.num_microbatches < 1 or self.num_chunks < 1:
            raise ConfigError("a pipeline needs at least one stage, microbatch and chunk")
        if not (self.forward_s > 0 and self.backward_s > 0 and 0 < self.weight_share < 1 and self.step_s >= 0):
            raise ConfigError("a pipeline needs positive durations, and a weight_share between 0 and 1")
        if self.schedule == "interleaved" and self.num_microbatches % self.num_stages:
            raise ConfigError(
                f"the interleaved schedule needs a multiple of {self.num_stages} microbatches (one per stage), got "
                f"{self.num_microbatches}"
            )


@dataclass(frozen=True, slots=True)
class StageBubbles:
    """One stage's part of an iteration."""

    gaps_s: tuple[float, ...]
    """Its bubbles in order."""
    num_in_flight: int
    """Most microbatches (times chunks) whose activations it holds at a time."""


@dataclass(frozen=True, slots=True)
class Iteration:
    """Length and bubbles of one iteration."""

    duration_s: float
    stages: tuple[StageBubbles, ...]

    @property
    def bubble_ratio(self) -> float:
        """Idle time of all stages over their time, the optimizer step counted as busy."""
        return sum(sum(stage.gaps_s) for stage in self.stages) / (self.duration_s * len(self.stages))


@dataclass(frozen=True, slots=True)
class _Operation:
    kind: str
    microbatch: int
    chunk: int


@lru_cache(maxsize=256)
def lay_out(spec: PipelineSpec) -> Iteration:
    """Lay an iteration out in time.

    Source: GPipe (NeurIPS 2019), PipeDream-flush/1F1B and interleaved 1F1B (Megatron-LM, SC 2021), zero bubble H1
    (ICLR 2024): orders of operations only; the times follow from the dependencies.
    """
    orders = [_order(spec, stage) for stage in range(spec.num_stages)]
    spans = _run(spec, orders)
    end_s = max(end for span in spans for _, _, end in span)
    stages = []
    for span in spans:
        gaps, free_s, in_flight, most = [], 0.0, 0, 0
        for operation, start, end in span:
            if start - free_s > 1e-9:
                gaps.append(start - free_s)
            free_s = end
            in_flight += (operation.kind == FORWARD) - (operation.kind == _last_kind(spec))
            most = max(most, in_flight)
        if end_s - free_s > 1e-9:
            gaps.append(end_s - free_s)
        stages.append(StageBubbles(tuple(gaps), most))
    return Iteration(end_s + spec.step_s, tuple(stages))


def _last_kind(spec: PipelineSpec) -> str:
    """The operation that lets go of a microbatch's activations."""
    return WEIGHT if spec.schedule == "zero-bubble" else BACKWARD


def _order(spec: PipelineSpec, stage: int) -> list[_Operation]:
    """Forward and backward operations of a stage in the order in which it does them."""
    num_stages, count = spec.num_stages, spec.num_microbatches
    num_chunks = spec.num_chunks if spec.schedule == "interleaved" else 1
    total = count * num_chunks

    def forward(k: int) -> _Operation:
        group, place = divmod(k, num_stages * num_chunks)
        chunk, microbatch = divmod(place, num_stages)
        return _Operation(FORWARD, group * num_stages + microbatch, chunk)

    def backward(k: int) -> _Operation:
        mirrored = forward(k)
        return _Operation(BACKWARD, mirrored.microbatch, num_chunks - 1 - mirrored.chunk)

    if num_chunks == 1:
        forwards = [_Operation(FORWARD, k, 0) for k in range(count)]
        backwards = [_Operation(BACKWARD, k, 0) for k in range(count)]
        num_first = count if spec.schedule == "gpipe" else min(num_stages - 1 - stage, count)
    else:
        forwards, backwards = [forward(k) for k in range(total)], [backward(k) for k in range(total)]
        num_first = min((num_stages - stage - 1) * 2 + (num_chunks - 1) * num_stages, total)
    order = forwards[:num_first]
    for k in range(total - num_first):
        order += [forwards[num_first + k], backwards[k]]
    return order + backwards[total - num_first :]


def _run(spec: PipelineSpec, orders: list[list[_Operation]]) -> list[list[tuple[_Operation, float, float]]]:
    """Give every operation its start and end. A stage that waits does gradients of weights that it has put off."""
    splits = spec.schedule == "zero-bubble"
    num_chunks = spec.num_chunks if spec.schedule == "interleaved" else 1
    durations = {
        FORWARD: spec.forward_s / num_chunks,
        BACKWARD: spec.backward_s * (1 - spec.weight_share if splits else 1) / num_chunks,
        WEIGHT: spec.backward_s * spec.weight_share,
    }
    done: dict[tuple[str, int, int, int], float] = {}
    spans: list[list[tuple[_Operation, float, float]]] = [[] for _ in orders]
    next_index = [0] * len(orders)
    put_off: list[list[_Operation]] = [[] for _ in orders]
    num_held = [0] * len(orders)
    """Microbatches by stage whose backward pass has not begun."""
    waiting: set[int] = set()
    heap = [(0.0, stage) for stage in range(len(orders))]
    while heap:
        now_s, stage = heapq.heappop(heap)
        waiting.discard(stage)
        index = next_index[stage]
        operation = None
        if index < len(orders[stage]):
            candidate = orders[stage][index]
            need = _needs(spec, stage, candidate, num_chunks)
            ready_s = 0.0 if need is None else done.get(need)
            # As many microbatches in flight as 1F1B has on its first stage: then weights come before the next forward.
            is_full = candidate.kind == FORWARD and len(put_off[stage]) + num_held[stage] >= spec.num_stages
            if is_full and put_off[stage]:
                pass
            elif ready_s is not None and ready_s <= now_s + 1e-12:
                operation = candidate
                num_held[stage] += 1 if candidate.kind == FORWARD else -1
                next_index[stage] += 1
            elif ready_s is not None and not (put_off[stage] and now_s + durations[WEIGHT] <= ready_s + 1e-12):
                heapq.heappush(heap, (ready_s, stage))
                continue
        if operation is None and put_off[stage]:
            operation = put_off[stage].pop(0)
        if operation is None:
            if index < len(orders[stage]):
                waiting.add(stage)
            continue
        end_s = now_s + durations[operation.kind]
        spans[stage].append((operation, now_s, end_s))
        done[operation.kind, operation.microbatch, operation.chunk, stage] = end_s
        if splits and operation.kind == BACKWARD:
            put_off[stage].append(_Operation(WEIGHT, operation.microbatch, operation.chunk))
        heapq.heappush(heap, (end_s, stage))
        for other in sorted(waiting):
            heapq.heappush(heap, (now_s, other))
        waiting.clear()
    return spans


def _needs(spec: PipelineSpec, stage: int, operation: _Operation, num_chunks: int) -> tuple[str, int, int, int] | None:
    """The neighbour's operation that this one waits for."""
    last = spec.num_stages - 1
    microbatch, chunk = operation.microbatch, operation.chunk
    if operation.kind == FORWARD:
        if stage > 0:
            return FORWARD, microbatch, chunk, stage - 1
        return (FORWARD, microbatch, chunk - 1, last) if chunk > 0 else None
    if stage < last:
        return BACKWARD, microbatch, chunk, stage + 1
    if chunk < num_chunks - 1:
        return BACKWARD, microbatch, chunk + 1, 0
    return FORWARD, microbatch, chunk, stage
