"""What the segments of a task's stages may take in a plan of a given value, by the bounds of all the other stages.

Takes the stages' bounds; gives seconds for every stage and segment.  Knows nothing of options.
"""

from __future__ import annotations

import numpy as np

from galvatron.cost.strategies import Floats

from .bounds import StageBound
from .geometry import Geometry
from .stages import Join


def most_work_s(geometry: Geometry, bounds: list[StageBound], at_most: float) -> list[Floats]:
    """What every segment's work may be in a plan of value ``at_most``: the other stages take at least their bounds.

    With S their least Σ and X their least possible largest, w must keep s·(φ·(S + w) + (m - φ)·max(w, X)) and
    m·(S + w) / pp within it (``Setting.combined_s``).
    """
    setting = geometry.setting
    m, fill = setting.num_microbatches, setting.fill
    budget = at_most / setting.hardware.device.full_speed_fraction
    most = []
    totals, largests = (_other_stages_s(geometry, bounds, join) for join in (np.add, np.maximum))
    for total, largest in zip(totals, largests, strict=True):
        with np.errstate(invalid="ignore"):  # nothing is left where the others cannot divide the rest
            if_largest = (budget - fill * total) / m
            if_smaller = (budget - fill * total - (m - fill) * largest) / fill
            shared = setting.pp * at_most / m - total
        by_path = np.where(if_largest >= largest, if_largest, if_smaller)
        most.append(np.where(np.isfinite(total), np.minimum(by_path, shared), -np.inf))
    return most


def _other_stages_s(geometry: Geometry, bounds: list[StageBound], join: Join) -> list[Floats]:
    """For every stage and segment: the least sum (or maximum) of all other stages' bounds.

    Infinite where they cannot divide the rest.
    """
    layers = geometry.num_layers
    matrices = [bound.matrix for bound in bounds]
    before, after = [_unreached(layers, 0)], [_unreached(layers, layers)]
    for matrix in matrices[:-1]:
        before.append(join(before[-1][:, None], matrix).min(axis=0))
    for matrix in reversed(matrices[1:]):
        after.append(join(matrix, after[-1]).min(axis=1))
    start = np.arange(layers + 1)[:, None]
    end = start + start.T
    inside, end = end <= layers, np.minimum(end, layers)
    others = []
    for first, last in zip(before, reversed(after), strict=True):
        least = np.where(inside, join(first[:, None], last)[start, end], np.inf)  # [first layer, k]
        others.append(least.min(axis=0, keepdims=True) if geometry.rows == 1 else least[: geometry.rows])
    return others


def _unreached(layers: int, start: int) -> Floats:
    value = np.full(layers + 1, np.inf)
    value[start] = 0.0
    return value
