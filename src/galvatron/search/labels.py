"""Chains of strategies so far, as arrays: which of them need not be looked at any more, and which may be taken as one.

Knows nothing of how chains grow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from galvatron.cost.strategies import Floats, Ints

MIN_BINS = 4_096  # of bytes, over all ranks and layouts


@dataclass(frozen=True)
class Labels:
    """Chains of equal length; ``parent`` points into the labels before, ``option`` into the class.

    ``held``: bytes; ``rank``: of the largest transient among all that there are.
    """

    entry: Ints
    layout: Ints
    work_s: Floats
    held: Ints
    rank: Ints
    parent: Ints
    option: Ints

    def take(self, at: Ints) -> Labels:
        """Some labels."""
        parent, option = self.parent[at], self.option[at]
        return Labels(self.entry[at], self.layout[at], self.work_s[at], self.held[at], self.rank[at], parent, option)

    def __len__(self) -> int:
        return len(self.work_s)


def near_front(labels: Labels, num_layouts: int) -> Ints:
    """Indices without those of labels that another of no higher rank equals in work and beats by a bin of bytes.

    Most dominated labels are far behind: binned, they are found without sorting.
    """
    group = labels.entry * num_layouts + labels.layout
    ranks, groups = int(labels.rank.max()) + 1, int(group.max()) + 1
    bins = max(MIN_BINS, len(labels)) // (ranks * groups)
    if bins < 2:
        return np.arange(len(labels))
    least = int(labels.held.min())
    bin_ = (labels.held - least) * bins // (int(labels.held.max()) - least + 1) + 1
    fastest = np.full((ranks, groups, bins + 1), np.inf)
    np.minimum.at(fastest, (labels.rank, group, bin_), labels.work_s)
    np.minimum.accumulate(fastest, axis=2, out=fastest)
    np.minimum.accumulate(fastest, axis=0, out=fastest)
    return np.flatnonzero(labels.work_s < fastest[labels.rank, group, bin_ - 1])


def undominated(labels: Labels, num_layouts: int) -> Ints:
    """Indices of the labels that no other of the same entry and layout equals or beats in work, bytes and rank.

    Of two equal in work and bytes both may stay; no more is claimed than that nothing better is lost.
    """
    group = labels.entry * num_layouts + labels.layout
    order = np.lexsort((labels.held, labels.work_s, group))
    if not len(order):
        return order
    held, rank, group = labels.held[order], labels.rank[order], group[order]
    lowered = held - group * (int(held.max() - held.min()) + 1)  # all of a group are below all of the groups before it
    levels = np.flatnonzero(np.bincount(rank))
    if len(levels) == 1:
        return np.sort(order[_lowest_yet(lowered)])
    kept = np.zeros(len(order), dtype=bool)
    for level in levels:
        # of this rank stay those that hold less than all faster ones of their group that are left at lower ranks
        rivals = np.flatnonzero(kept | (rank == level))
        kept[rivals] = np.where(rank[rivals] == level, _lowest_yet(lowered[rivals]), True)
    return np.sort(order[kept])


def _lowest_yet(values: Ints) -> npt.NDArray[np.bool_]:
    """Which values are below all before them."""
    lowest = np.ones(len(values), dtype=np.bool_)
    np.less(values[1:], np.minimum.accumulate(values[:-1]), out=lowest[1:])
    return lowest


def fastest(labels: Labels, transients: Ints, num_layouts: int, most: int) -> tuple[Ints, Ints, Ints]:
    """At most about ``most`` labels that stand for all: the fastest of every cell of a grid of bytes.

    With them the least held bytes and rank of each cell.  Cells are as small as ``most`` allows, though one an entry
    and layout is left at least.
    """
    group = labels.entry * num_layouts + labels.layout
    transient = transients[labels.rank]
    held, above = labels.held - labels.held.min(), transient - transient.min()
    size = max(int(max(held.max(), above.max())) // most, 1)
    while True:
        columns, rows = int(held.max()) // size + 1, int(above.max()) // size + 1
        cell = (group * columns + held // size) * rows + above // size
        ordered = np.sort(cell)  # several times as fast as np.unique, which hashes
        num_cells = 1 + np.count_nonzero(ordered[1:] != ordered[:-1])
        if num_cells <= most or columns == rows == 1:
            break
        size = math.ceil(size * max(1.25, (num_cells / most) ** 0.75))
    order = np.lexsort((labels.work_s, cell))
    starts = np.flatnonzero(np.concatenate(([True], cell[order][1:] != cell[order][:-1])))
    least_held, least_rank = (np.minimum.reduceat(values[order], starts) for values in (labels.held, labels.rank))
    return order[starts], least_held, least_rank
