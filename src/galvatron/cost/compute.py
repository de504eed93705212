"""Compute seconds at a sharded shape, interpolated between measured batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .strategies import Floats


def interpolate(points: Sequence[tuple[int, float | Sequence[float]]], batch: Floats | float) -> Floats:
    """Seconds at ``batch`` from measured (batch, seconds), ascending: piecewise linear through the points.

    Above the last point the last slope goes on (never below zero).  Below the first the first slope goes on
    towards the time that even an empty batch would take (never below zero); with one point alone time is
    proportional to the batch.  Of several seconds a point, all are given: [batch, which].
    """
    x = np.array([measured for measured, _ in points], dtype=np.float64)
    y = np.array([seconds for _, seconds in points], dtype=np.float64).reshape(len(x), -1)
    at_batch = np.asarray(batch, dtype=np.float64)[..., None]
    if len(x) == 1:
        found = at_batch * (y[0] / x[0])
    else:
        slopes = np.diff(y, axis=0) / np.diff(x)[:, None]
        below = np.searchsorted(x[1:-1], at_batch[..., 0], side="right")
        floor, last = np.clip(y[0] - slopes[0] * x[0], 0.0, y[0]), np.maximum(slopes[-1], 0.0)
        inside = y[below] + slopes[below] * (np.minimum(at_batch, x[-1]) - x[below][..., None])
        inside = inside + last * np.maximum(at_batch - x[-1], 0.0)
        found = np.where(at_batch < x[0], floor + (y[0] - floor) * at_batch / x[0], inside)
    seconds: Floats = found[..., 0] if np.ndim(points[0][1]) == 0 else found
    return seconds
