"""Prices of bytes at which a dual bound is exact: slopes of the lower hulls of options.

Takes seconds and bytes of options; gives seconds a byte.
"""

from __future__ import annotations

import itertools

import numpy as np

from galvatron.cost.strategies import Floats, Ints

NUM_PRICES = 24


def prices_of(hulls: list[Floats]) -> Floats:
    """Slopes of the lower hulls of all classes, thinned to ``NUM_PRICES``, with 0."""
    slopes = np.unique(np.concatenate([np.zeros(1), *hulls]))
    if len(slopes) > NUM_PRICES:
        slopes = slopes[np.unique(np.linspace(0, len(slopes) - 1, NUM_PRICES).astype(int))]
    return slopes


def hull_slopes(work_s: Floats, held: Ints) -> Floats:
    """Seconds a byte along the lower left convex hull of (held, work), from the fastest option to the smallest."""
    order = np.lexsort((held, work_s))
    x, y = held[order].astype(np.float64), work_s[order]
    falls = np.concatenate(([True], x[1:] < np.minimum.accumulate(x)[:-1]))
    hull: list[tuple[float, float]] = []
    for point in zip(x[falls], y[falls], strict=True):
        while len(hull) > 1 and _turns(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return np.array([(b[1] - a[1]) / (a[0] - b[0]) for a, b in itertools.pairwise(hull)])


def _turns(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or above the line from a to c, held falling from a to c."""
    return (b[1] - a[1]) * (a[0] - c[0]) >= (c[1] - a[1]) * (a[0] - b[0])
