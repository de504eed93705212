"""Compute seconds at a sharded shape, interpolated between measured batches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def interpolate(points: Sequence[tuple[int, float]], batch: int) -> float:
    """Seconds at ``batch`` from measured (batch, seconds), ascending: piecewise linear through the points.

    Above the last point the last slope goes on (never below zero); below the first, or with one point alone,
    time is proportional to the batch.
    """
    first_batch, first_s = points[0]
    if batch <= first_batch or len(points) == 1:
        return first_s * batch / first_batch
    for (low, low_s), (high, high_s) in itertools.pairwise(points):
        if batch <= high:
            return low_s + (high_s - low_s) * (batch - low) / (high - low)
    (low, low_s), (high, high_s) = points[-2:]
    return high_s + max((high_s - low_s) / (high - low), 0.0) * (batch - high)
