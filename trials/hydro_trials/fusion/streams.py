"""Which samples a lane sees at which step, and the seeds that this follows from.

Everything is a function of seed and step, so a lane that resumes or moves needs no state of a sampler.

Shape suffixes: F = lanes, B = samples per lane.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hydro_trials.fusion.batch import LaneBatch
from hydro_trials.samples import num_samples, take
from hydro_trials.study import Data


def derive_seed(*parts: int | str) -> int:
    """A seed for one purpose; different parts give unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@lru_cache(maxsize=16)
def _order(seed: int, epoch: int, num: int) -> Tensor:
    return torch.randperm(num, generator=torch.Generator().manual_seed(derive_seed(seed, "data", epoch)))


@dataclass(frozen=True)
class SampleStream:
    """Endless shuffled epochs; the remainder of an epoch that fills no batch is left out."""

    seed: int
    num_samples: int
    batch_size: int

    def indices(self, batch: int) -> Tensor:
        """Sample numbers (batch_size,) of the batch with this number, counting from 0."""
        epoch, place = divmod(batch, self.num_samples // self.batch_size)
        return _order(self.seed, epoch, self.num_samples)[place * self.batch_size : (place + 1) * self.batch_size]


@dataclass(frozen=True)
class LanePlace:
    """Where a lane stands: what its next batch follows from."""

    stream: SampleStream
    seed: int
    step: int


def make_batch(data: Data, places: Sequence[LanePlace], microbatch: int, num_microbatches: int) -> LaneBatch:
    """One microbatch of every lane, padded to the largest where batch sizes differ.

    Lanes that stand at the same place of the same stream share their samples, which are then gathered once.
    """
    x_N, y_N = data.train
    seeds = tuple(derive_seed(place.seed, "draws", place.step, microbatch) for place in places)
    rows = [place.stream.indices(place.step * num_microbatches + microbatch) for place in places]
    if len(places) > 1 and all((p.stream, p.step) == (places[0].stream, places[0].step) for p in places):
        return LaneBatch(take(x_N, rows[0]), take(y_N, rows[0]), True, seeds)
    sizes = [len(row) for row in rows]
    if len(set(sizes)) == 1:
        index_FB = torch.stack(rows)
        return LaneBatch(take(x_N, index_FB), take(y_N, index_FB), False, seeds)
    index_FB = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    weights_FB = torch.nn.utils.rnn.pad_sequence(
        [torch.full((size,), 1.0 / size, dtype=torch.float64) for size in sizes], batch_first=True
    )
    device = tree_leaves(x_N)[0].device
    return LaneBatch(take(x_N, index_FB), take(y_N, index_FB), False, seeds, weights_FB.to(device))


def num_batches(data: Data, batch_size: int) -> int:
    """Batches in an epoch of the training samples."""
    return num_samples(data.train[0]) // batch_size
