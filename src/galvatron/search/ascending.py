"""Things by ascending bound, none bounded more closely than their order asks for.

Takes cheap bounds and ways to raise them; gives the thing of the least bound.  Knows nothing of what is bounded.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

Closer = Callable[[int], float]
"""A closer lower bound of a thing, by its index."""


class Ascending:
    """Indices of ``floors`` by ascending bound; ``closer``: what to ask of one in turn before it is the first."""

    def __init__(self, floors: Sequence[float], closer: Sequence[Closer]) -> None:
        self._closer = closer
        self._queue = [(floor, 0, i) for i, floor in enumerate(floors)]
        heapq.heapify(self._queue)

    def first(self, at_most: float) -> int | None:
        """The index of the least bound, all asked; None where that exceeds ``at_most`` or is infinite."""
        while self._queue and self.least <= at_most and self.least < math.inf:
            bound, asked, i = self._queue[0]
            if asked == len(self._closer):
                return i
            heapq.heapreplace(self._queue, (max(bound, self._closer[asked](i)), asked + 1, i))
        return None

    def drop(self) -> None:
        """Take the first one out."""
        heapq.heappop(self._queue)

    @property
    def least(self) -> float:
        """What none of those left is below."""
        return self._queue[0][0] if self._queue else math.inf

    @property
    def left(self) -> list[tuple[float, int]]:
        """(bound as far as asked, index) of those left, ascending."""
        return sorted((bound, i) for bound, _, i in self._queue)
