"""Which training samples a lane sees, from its seed and its step alone.

So a lane's data depend neither on its row nor on other lanes, and resuming needs no state but the step.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A seed for one purpose; different parts give unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class SampleStream:
    """Endless shuffled epochs of one lane; the remainder of an epoch that fills no batch is left out."""

    def __init__(self, seed: int, num_samples: int, batch_size: int) -> None:
        self._seed, self._num_samples, self._batch_size = seed, num_samples, batch_size
        self._num_batches = num_samples // batch_size
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)

    def indices(self, step: int) -> Tensor:
        """Sample numbers (batch_size,) of the batch for the update after `step` finished ones."""
        epoch, batch = divmod(step, self._num_batches)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, "data", epoch))
            self._order = torch.randperm(self._num_samples, generator=generator)
            self._epoch = epoch
        return self._order[batch * self._batch_size : (batch + 1) * self._batch_size]
