"""Options that are left when those which others equal or beat are taken out: a tenth of many, at times.

Takes Options or a Space; gives indices, or what is left.  Knows nothing of stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from galvatron.core.model import UnitName
from galvatron.cost.strategies import Ints

from .space import Options, Space

NEVER = 2**50  # bytes of an option that does not exist


@dataclass(frozen=True)
class Staircase:
    """Options that no other equals or beats in work and resident bytes of those of equal activations and level.

    Activations take few values (they follow tp and recompute), so that this leaves few options, and among them
    whatever is cheapest at any price of bytes and any number of microbatches in flight.  ``least_transient[level]``:
    of all options of that level.
    """

    options: Options
    level: Ints
    least_transient: Ints

    @classmethod
    def of(cls, options: Options, edges: Ints) -> Staircase:
        """Of some options; ``edges``: the largest transient of every level."""
        level = np.searchsorted(edges, options.transient_bytes)
        kept = unbeaten(options, _numbered(_numbered(options.activation_bytes, options.waiting_bytes), level))
        least = np.full(len(edges), NEVER, dtype=np.int64)
        np.minimum.at(least, level, options.transient_bytes)
        return cls(options.take(kept), level[kept], least)


def without_beaten(space: Space) -> Space:
    """The same without options of layers that another of equal layout and passing bytes equals or beats.

    That is nine of ten of many, which would else be looked at for every stage and level.
    """
    chosen: dict[UnitName, Ints] = {}
    for kind in space.setting.model.spec.layers:
        options = space.options[kind.name]
        passing = _numbered(options.activation_bytes, options.waiting_bytes)
        alike = _numbered(_numbered(passing, options.transient_bytes), options.layout)
        chosen[kind.name] = np.sort(unbeaten(options, alike))
    return space.restricted(chosen)


def unbeaten(options: Options, group: Ints) -> Ints:
    """Indices of the options that no other of the same group, a number from 0, equals or beats in work and bytes."""
    order = np.lexsort((options.resident_bytes, options.work_s, group))
    kept: Ints = order[_falls(options.resident_bytes[order], group[order])]
    return kept


def _numbered(a: Ints, b: Ints) -> Ints:
    """A number from 0 for every pair of values that occurs, ascending."""
    own, at = np.unique(b, return_inverse=True)
    pairs: Ints = np.unique(np.unique(a, return_inverse=True)[1] * len(own) + at, return_inverse=True)[1]
    return pairs


def _falls(values: Ints, group: Ints) -> np.ndarray:
    """Where ``values`` fall below all before them in their group (groups ascending)."""
    if not len(values):
        return np.zeros(0, dtype=bool)
    step = int(values.max() - values.min()) + 1
    lowered = values - group.astype(np.int64) * step
    least = np.minimum.accumulate(lowered)
    return np.concatenate(([True], lowered[1:] < least[:-1]))
