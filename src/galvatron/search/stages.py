"""Dividing layers among stages: exact for whatever grows with Σ w and max w, boundary layouts included.

Takes one table a stage (the least work for every number of layers, entry layout and last layout); gives the best
contiguous division.  Knows nothing of strategies or bytes, which the tables have settled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .space import Floats, Ints

Segment = tuple[int, int, int]
"""One stage's share: number of layers, entry layout, last layout."""


@dataclass(frozen=True)
class Division:
    """The best division and its value."""

    value: float
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class _Front:
    """Partial divisions that no other equals or beats in both total and largest, with what came before."""

    total: Floats
    largest: Floats
    layers: Ints
    layout: Ints
    index: Ints


def divide(tables: list[Floats], num_layers: int, value: Callable[[Floats, Floats], Floats]) -> Division | None:
    """Minimise ``value(Σ w, max w)``, which never falls when either grows; None when no division is possible.

    ``tables[stage][k - 1, entry, last]``: work of a stage with k layers, infinite where impossible.  The first
    stage has one entry.  Exactness: a later stage adds the same to total, and raises the largest no further, for
    the partial division that is ahead in both.
    """
    start = _Front(np.zeros(1), np.zeros(1), *(np.zeros(1, dtype=np.int64) for _ in range(3)))
    history: list[dict[tuple[int, int], _Front]] = [{(0, 0): start}]
    for stage, table in enumerate(tables):
        behind = len(tables) - 1 - stage
        counts = range(num_layers, num_layers + 1) if behind == 0 else range(stage + 1, num_layers - behind + 1)
        history.append(_advance(history[-1], table, counts))
    best: tuple[float, int, int] | None = None
    for (_, layout), front in sorted(history[-1].items()):
        values = value(front.total, front.largest)
        index = int(np.argmin(values))
        if best is None or values[index] < best[0]:
            best = (float(values[index]), layout, index)
    return None if best is None else Division(best[0], _trace(history, num_layers, best[1], best[2]))


def _advance(before: dict[tuple[int, int], _Front], table: Floats, counts: range) -> dict[tuple[int, int], _Front]:
    """Fronts by (layers so far, last layout) after one more stage."""
    fronts = {}
    for layers in counts:
        for last in range(table.shape[2]):
            parts = []
            for (used, entry), front in before.items():
                k = layers - used
                if 1 <= k <= table.shape[0] and np.isfinite(work := table[k - 1, entry, last]):
                    count = len(front.total)
                    columns = (np.full(count, used), np.full(count, entry), np.arange(count))
                    parts.append((front.total + work, np.maximum(front.largest, work), *columns))
            if parts:
                fronts[layers, last] = _best(_Front(*(np.concatenate(c) for c in zip(*parts, strict=True))))
    return fronts


def _best(front: _Front) -> _Front:
    order = np.lexsort((front.largest, front.total))
    largest = front.largest[order]
    first = np.concatenate(([True], largest[1:] < np.minimum.accumulate(largest)[:-1]))
    kept = order[first]
    return _Front(front.total[kept], front.largest[kept], front.layers[kept], front.layout[kept], front.index[kept])


def _trace(history: list[dict[tuple[int, int], _Front]], layers: int, layout: int, index: int) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    for fronts in reversed(history[1:]):
        front = fronts[layers, layout]
        used, entry = int(front.layers[index]), int(front.layout[index])
        segments.append((layers - used, entry, layout))
        layers, layout, index = used, entry, int(front.index[index])
    return tuple(reversed(segments))
