"""What F lanes see in one forward pass.

Shape suffixes: F = lanes, B = samples per lane (of the lane with most samples, where lanes differ).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.utils._pytree import tree_map

from hydro_trials.samples import Tree


@dataclass(frozen=True)
class LaneBatch:
    """Samples of all lanes."""

    x: Tree
    """Inputs, each tensor (F, B, ...), or (B, ...) where all lanes share them."""
    y: Tree
    """Targets, likewise."""
    shared: bool
    """Whether all lanes see the same samples: `x` and `y` then have no dimension of lanes."""
    seeds: tuple[int, ...]
    """One per lane: what its random draws in this step derive from."""
    weights_FB: Tensor | None = None  # noqa: N815
    """Weight of each sample in its lane's loss, 0 for padding; None where every lane has B samples."""

    @property
    def num_lanes(self) -> int:
        return len(self.seeds)

    def of_lane(self, row: int) -> tuple[Tree, Tree]:
        """One lane's own samples, without padding."""
        if self.shared:
            return self.x, self.y
        num_samples: int | None = None
        if self.weights_FB is not None:
            num_samples = int(self.weights_FB[row].count_nonzero())
        return tree_map(lambda t: t[row, :num_samples], self.x), tree_map(lambda t: t[row, :num_samples], self.y)
