"""Compute seconds at a sharded shape, interpolated between measured batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .strategies import Floats


def interpolate(points: Sequence[tuple[int, float]], batch: Floats | float) -> Floats:
    """Seconds at ``batch`` from measured (batch, seconds), ascending: piecewise linear through the points.

    Above the last point the last slope goes on (never below zero).  Below the first the first slope goes on
    towards the time that even an empty batch would take (never below zero); with one point alone time is
    proportional to the batch.
    """
    x, y = np.array(points, dtype=np.float64).T
    batch = np.asarray(batch, dtype=np.float64)
    slopes = np.diff(y) / np.diff(x) if len(x) > 1 else y / x
    floor = np.clip(y[0] - slopes[0] * x[0], 0.0, y[0]) if len(x) > 1 else 0.0
    last = max(float(slopes[-1]), 0.0)
    inside = np.interp(batch, x, y) + last * np.maximum(batch - x[-1], 0.0)
    seconds: Floats = np.where(batch < x[0], floor + (y[0] - floor) * batch / x[0], inside)
    return seconds
