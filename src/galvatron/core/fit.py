"""Lines through measurements: α + β·bytes by relative least squares.

Takes (bytes, seconds) pairs; gives the two coefficients and how well they fit.  Knows nothing of torch,
of ranks or of what was measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

Sample = tuple[int, float]


def fit_line(samples: Sequence[Sample]) -> tuple[float, float]:
    """Non-negative (latency_s, seconds_per_byte) with the least Σ ((α + β·bytes − t) / t)².

    Relative, because the small sizes that set α are a thousand times faster than the large ones that set β.
    The problem is convex in two variables, so the best point is the free minimum if that is non-negative and
    otherwise the better of the two edges.  Every time must be positive.
    """
    s0 = sum(1 / t**2 for _, t in samples)
    s1 = sum(b / t**2 for b, t in samples)
    s2 = sum(b**2 / t**2 for b, t in samples)
    r0 = sum(1 / t for _, t in samples)
    r1 = sum(b / t for b, t in samples)
    candidates = [(r0 / s0, 0.0), (0.0, r1 / s2 if s2 else 0.0)]
    determinant = s0 * s2 - s1**2
    if determinant > 1e-12 * s0 * s2:
        candidates.append(((r0 * s2 - r1 * s1) / determinant, (r1 * s0 - r0 * s1) / determinant))
    feasible = [line for line in candidates if min(line) >= 0]
    return min(feasible, key=lambda line: sum(_relative_error(line, sample) ** 2 for sample in samples))


def residual(line: tuple[float, float], samples: Sequence[Sample]) -> float:
    """Median of |fitted − measured| / measured."""
    return statistics.median(abs(_relative_error(line, sample)) for sample in samples)


def _relative_error(line: tuple[float, float], sample: Sample) -> float:
    num_bytes, seconds = sample
    return (line[0] + line[1] * num_bytes) / seconds - 1
