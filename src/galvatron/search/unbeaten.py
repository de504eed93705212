"""Options that are left when those which others equal or beat are taken out: a tenth of many, at times.

Takes Options or a Space; gives indices, or what is left.  Knows nothing of stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from galvatron.core.model import UnitName
from galvatron.cost.strategies import Floats, Ints

from .space import Options, Space

NEVER = 2**50  # bytes of an option that does not exist

MIN_BINS, MAX_BINS = 8, 64
"""Of bytes, into which the options of a group are sorted before any is compared with another."""


@dataclass(frozen=True)
class Staircase:
    """Options that no other equals or beats in work and resident bytes of those of equal activations and level.

    Activations take few values (they follow tp and recompute), so that this leaves few options, and among them
    whatever is cheapest at any price of bytes and any number of microbatches in flight.  Their levels ascend;
    ``least_transient[level]``: of all options of that level.
    """

    options: Options
    level: Ints
    least_transient: Ints

    @classmethod
    def of(cls, options: Options, edges: Ints) -> Staircase:
        """Of some options; ``edges``: the largest transient of every level."""
        level = np.searchsorted(edges, options.transient_bytes)
        kept = unbeaten(options, _numbered(_numbered(options.activation_bytes, options.waiting_bytes), level))
        kept = kept[np.argsort(level[kept], kind="stable")]
        least = np.full(len(edges), NEVER, dtype=np.int64)
        np.minimum.at(least, level, options.transient_bytes)
        return cls(options.take(kept), level[kept], least)

    def lower(self, least: Floats | Ints, values: Floats | Ints) -> None:
        """Lower ``least[level, ...]`` to the least of the ``values[option, ...]`` of that level or one below."""
        starts = np.flatnonzero(_first_of_equal(self.level))
        if len(starts):
            least[self.level[starts]] = np.minimum.reduceat(values, starts)
        np.minimum.accumulate(least, axis=0, out=least)


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
    near = _near(options.work_s, options.resident_bytes, group)
    order = near[np.lexsort((options.resident_bytes[near], options.work_s[near], group[near]))]
    kept: Ints = order[_falls(options.resident_bytes[order], group[order])]
    return kept


def _near(work_s: Floats, bytes_: Ints, group: Ints) -> Ints:
    """Indices without those that another of the group equals in work and beats by a bin of bytes: without sorting."""
    num_groups = int(group.max(initial=-1)) + 1
    bins = min(len(group) // max(num_groups, 1), MAX_BINS)
    if bins < MIN_BINS:
        return np.arange(len(group))
    bin_ = np.searchsorted(np.sort(bytes_)[:: -(-len(bytes_) // bins)], bytes_, side="right")
    fastest = np.full((num_groups, bins + 1), np.inf)
    np.minimum.at(fastest, (group, bin_), work_s)
    np.minimum.accumulate(fastest, axis=1, out=fastest)
    return np.flatnonzero(work_s < fastest[group, bin_ - 1])


def distinct(values: Ints) -> Ints:
    """The values that occur, ascending; sorting is several times as fast as np.unique, which hashes."""
    ordered = np.sort(values)
    return ordered[_first_of_equal(ordered)]


def _first_of_equal(ordered: Ints) -> NDArray[np.bool_]:
    first = np.ones(len(ordered), dtype=bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return first


def _numbered(a: Ints, b: Ints) -> Ints:
    """A number from 0 for every pair of values that occurs, ascending."""
    of_a, of_b = distinct(a), distinct(b)
    pair = np.searchsorted(of_a, a) * len(of_b) + np.searchsorted(of_b, b)
    number: Ints = np.searchsorted(distinct(pair), pair)
    return number


def _falls(values: Ints, group: Ints) -> np.ndarray:
    """Where ``values`` fall below all before them in their group (groups ascending)."""
    if not len(values):
        return np.zeros(0, dtype=bool)
    step = int(values.max() - values.min()) + 1
    lowered = values - group.astype(np.int64) * step
    least = np.minimum.accumulate(lowered)
    return np.concatenate(([True], lowered[1:] < least[:-1]))
