"""How moments in host memory pass through a device: slice by slice, each of one unit's parameters.

Knows nothing of torch: the runtime copies by these numbers, and the cost model counts by them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SLICE_ELEMENTS = 2**22
"""Parameters whose moments travel together: 32 MiB, a millisecond over PCIe, beside which a copy's start is nothing."""
SLOTS = 3
"""Slices on the device at once: one that comes, one that is used, one that goes."""
MOMENT_BYTES = 8
"""AdamW's two, float32, of a parameter."""


def slot_bytes(elements: NDArray[np.int64]) -> NDArray[np.int64]:
    """The most of a device that moments of a unit of ``elements`` parameters take while they pass through."""
    return SLOTS * MOMENT_BYTES * np.minimum(elements, SLICE_ELEMENTS)
