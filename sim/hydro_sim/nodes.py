"""The devices of one partition: which node gives a job its devices, found without looking at every node."""

from __future__ import annotations

import heapq

from hydro_slurm.errors import SimulationError

Allocation = int | tuple[tuple[int, int], ...]
"""A node that gives all devices of a job, or (node, devices) of each node; see `NodePool.take`."""

_SLACK = 4
"""A heap of nodes holds outdated entries up to this many times the nodes; then it is made anew."""


class NodePool:
    """Nodes with the same number of devices, and the free devices of each.

    A job that fits one node gets the fullest node that has room (best fit), the first of these by number. A larger
    job gets whole nodes, and for what is left over one more node, best fit. Nodes are kept in one heap per number of
    free devices; entries that are outdated are skipped when they come up, so taking and giving back costs the
    logarithm of the number of nodes.

    Args:
        num_nodes: Nodes.
        devices_per_node: Devices of each.
    """

    def __init__(self, num_nodes: int, devices_per_node: int) -> None:
        if num_nodes < 1 or devices_per_node < 1:
            raise SimulationError(f"a partition needs nodes with devices, got {num_nodes} with {devices_per_node} each")
        self.num_nodes, self.devices_per_node = num_nodes, devices_per_node
        self.num_devices = num_nodes * devices_per_node
        self.num_free = self.num_devices
        self.free = [devices_per_node] * num_nodes
        """Free devices by node; -1 for a node that is down."""
        self._counts = [0] * (devices_per_node + 1)
        self._counts[devices_per_node] = num_nodes
        self._heaps: list[list[int]] = [[] for _ in range(devices_per_node + 1)]
        self._heaps[devices_per_node] = list(range(num_nodes))
        self._max_entries = _SLACK * num_nodes + 64

    def fits(self, num_devices: int) -> bool:
        """Whether a job could start now."""
        if num_devices > self.num_free:
            return False
        per_node, counts = self.devices_per_node, self._counts
        if num_devices <= per_node:
            return any(counts[num_devices:])
        num_whole, rest = divmod(num_devices, per_node)
        return counts[per_node] > num_whole or (
            counts[per_node] == num_whole and (rest == 0 or any(counts[rest:per_node]))
        )

    def take(self, num_devices: int) -> Allocation | None:
        """Give a job its devices; None if they are not free in the shape that it needs."""
        per_node = self.devices_per_node
        if num_devices <= per_node:
            counts = self._counts
            for num_free in range(num_devices, per_node + 1):
                if counts[num_free]:
                    node = self._first(num_free)
                    self._set(node, num_free, num_free - num_devices)
                    self.num_free -= num_devices
                    return node
            return None
        if not self.fits(num_devices):
            return None
        num_whole, rest = divmod(num_devices, per_node)
        parts = []
        for _ in range(num_whole):
            node = self._first(per_node)
            self._set(node, per_node, 0)
            parts.append((node, per_node))
        self.num_free -= num_whole * per_node
        if rest:
            last = self.take(rest)
            assert isinstance(last, int)  # `fits` has found one
            parts.append((last, rest))
        return tuple(parts)

    def give_back(self, allocation: Allocation, num_devices: int) -> None:
        """Take a job's devices back. Devices of a node that is down come back with the node."""
        parts = ((allocation, num_devices),) if isinstance(allocation, int) else allocation
        for node, count in parts:
            num_free = self.free[node]
            if num_free >= 0:
                self._set(node, num_free, num_free + count)
                self.num_free += count

    def fail(self, node: int) -> None:
        """A node goes down. Its jobs are to be ended by the caller, after this."""
        num_free = self.free[node]
        self._counts[num_free] -= 1
        self.free[node] = -1
        self.num_free -= num_free

    def repair(self, node: int) -> None:
        """A node that was down comes back, empty."""
        self.free[node] = self.devices_per_node
        self.num_free += self.devices_per_node
        self._enter(node, self.devices_per_node)

    def _first(self, num_free: int) -> int:
        """The first node with so many free devices; there must be one. Its entry is taken out."""
        heap, free = self._heaps[num_free], self.free
        while True:
            node = heapq.heappop(heap)
            if free[node] == num_free:
                return node

    def _set(self, node: int, before: int, now: int) -> None:
        self._counts[before] -= 1
        self.free[node] = now
        self._enter(node, now)

    def _enter(self, node: int, num_free: int) -> None:
        self._counts[num_free] += 1
        if num_free == 0:
            return
        heap = self._heaps[num_free]
        heapq.heappush(heap, node)
        if len(heap) > self._max_entries:
            heap[:] = [other for other, count in enumerate(self.free) if count == num_free]
