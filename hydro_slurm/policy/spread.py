"""Which lanes go where, so that the last of them ends as early as can be."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_NUM_HALVINGS = 50
_ROUNDING = 1 + 1e-12


@dataclass(frozen=True, slots=True)
class Place:
    """A bundle, running or to be, as a place for lanes."""

    lanes: int
    """Lanes that it holds already."""
    max_lanes: int
    speed: float
    """Seconds of device time per second."""


def spread_lanes(count: int, places: Sequence[Place], step_costs: Sequence[float]) -> list[int]:
    """Hand out lanes so that the slowest step, in wall-clock time, is as short as possible.

    A lane goes where the step that it joins would end first, counted with it: with no gain from fusion this balances
    lanes in proportion to speed; where a profile says that fusing is nearly free, lanes gather on fast devices.

    Args:
        count: Lanes to hand out.
        places: Where they may go; among equals the earlier one gets the lane.
        step_costs: Duration of a step on a device of its own by number of lanes, from 0 lanes on, never falling.

    Returns:
        Lanes for each place; their sum is `count` unless all places are full.
    """
    added = [0] * len(places)
    room = [max(min(place.max_lanes, len(step_costs) - 1) - place.lanes, 0) * (place.speed > 0) for place in places]
    count = min(count, sum(room))
    if count == 0:
        return added
    level = _level_below(count, places, room, step_costs)
    for index, place in enumerate(places):
        added[index] = _lanes_below(level, place, room[index], step_costs)
    missing = count - sum(added)
    heap = [
        (step_costs[place.lanes + added[index] + 1] / place.speed, index)
        for index, place in enumerate(places)
        if added[index] < room[index]
    ]
    heapq.heapify(heap)
    for _ in range(missing):
        _, index = heapq.heappop(heap)
        added[index] += 1
        if added[index] < room[index]:
            place = places[index]
            heapq.heappush(heap, (step_costs[place.lanes + added[index] + 1] / place.speed, index))
    return added


def _level_below(count: int, places: Sequence[Place], room: Sequence[int], step_costs: Sequence[float]) -> float:
    """A step duration at which fewer than `count` lanes are handed out, as large as halving finds it."""
    classes = Counter((place, num_free) for place, num_free in zip(places, room, strict=True) if num_free)
    low, high = 0.0, max(step_costs[place.lanes + num_free] / place.speed for place, num_free in classes)
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        total = sum(num * _lanes_below(middle, place, free, step_costs) for (place, free), num in classes.items())
        if total < count:
            low = middle
        else:
            high = middle
    return low


def _lanes_below(level: float, place: Place, room: int, step_costs: Sequence[float]) -> int:
    fitting = bisect_right(step_costs, level * place.speed * _ROUNDING) - 1
    return min(max(fitting - place.lanes, 0), room)
