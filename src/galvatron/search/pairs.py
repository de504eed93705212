"""Pairs of ends of which a part of a space has one: which need be looked at, and what no plan of each is below.

Takes a Space whose ends have equal strategies, or whose embedding says what runs between stacks; gives pairs of options
and seconds.  Knows nothing of how a plan is found.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from galvatron.cost.strategies import Floats, Ints

from .bounds import Bounds, bounds_of
from .space import Space
from .stages import Join

Pairs = Sequence[tuple[int, int]] | Ints
"""(embedding, head) as indices of their options; ``ANY`` head where they need not be alike."""

ANY = -1


def floors_s(space: Space, bounds: Bounds, pairs: Pairs) -> Floats:
    """Seconds that no plan of several stages with each pair is below: Σ and max at their least, each on its own."""
    first, last = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    stages, layers = space.geometry.stages, space.geometry.num_layers
    own, of_first = np.unique(first, return_inverse=True)
    with_embedding = bounds.with_each(stages[0], space.options["embedding"].take(own))[:, 0]  # [option, end]
    own, of_last = np.unique(last, return_inverse=True)
    heads = space.options["head"] if ANY in own else space.options["head"].take(own)
    ending = bounds.with_each(stages[-1], heads)
    if ANY in own:
        ending = ending.min(axis=0, keepdims=True)
    starts = np.arange(layers + 1)
    row = np.zeros_like(starts) if space.geometry.rows == 1 else np.minimum(starts, ending.shape[1] - 1)
    with_head = ending[:, row, layers - starts]  # [option, start]
    between = [bound.matrix for bound in bounds.between]
    total, largest = (
        _joined(with_embedding, between, with_head, of_first, of_last, join) for join in (np.add, np.maximum)
    )
    return bounds_of(space.setting, total, largest)


def _joined(first: Floats, between: list[Floats], last: Floats, of_first: Ints, of_last: Ints, join: Join) -> Floats:
    """For every pair the least sum (or maximum) over all divisions; infinite where there is none."""
    reached = np.flatnonzero(np.isfinite(first).any(axis=0))
    through = np.full((len(reached), first.shape[1]), np.inf)  # [layers before, layers after those between]
    through[np.arange(len(reached)), reached] = 0.0
    for work in between:
        through = join(through[:, :, None], work).min(axis=1)
    least = np.full(len(of_first), np.inf)
    for start in np.flatnonzero(np.isfinite(last).any(axis=0) & np.isfinite(through).any(axis=0)):
        before = join(first[:, reached], through[:, start]).min(axis=1)
        np.minimum(least, join(before[of_first], last[of_last, start]), out=least)
    return least


def undominated_pairs(space: Space) -> list[tuple[int, int]]:
    """Pairs that no other equals or beats in bytes and in work, what runs between stacks included.

    Work counts the change of layout towards every layout that layers may have: where these have but one, pairs that are
    alike in all but their own are one pair.
    """
    any_head = [(i, ANY) for i in range(len(space.options["embedding"]))]
    pairs = np.array(any_head if space.end_pairs is None else space.end_pairs)
    ends = [space.options["embedding"].take(pairs[:, 0])]
    moves_s = [space.moves_s[space.geometry.kinds[0]][:, space.layer_layouts]]  # [layout of the end, of the layer]
    if space.end_pairs is not None:
        ends.append(space.options["head"].take(pairs[:, 1]))
        moves_s.append(space.moves_s["head"][space.layer_layouts].T)
    columns = [c for o in ends for c in (o.resident_bytes, o.activation_bytes, o.waiting_bytes, o.transient_bytes)]
    columns += [work for o, move in zip(ends, moves_s, strict=True) for work in o.work_s + move.T[:, o.layout]]
    if space.is_joined:
        columns += [row for bytes_ in space.geometry.between_bytes(ends[0].strategies) for row in bytes_]
    table = np.array(columns, dtype=np.float64).T
    kept: list[int] = []
    for at in np.lexsort((*table.T[::-1], sum(o.work_s for o in ends))):
        if not (table[kept] <= table[at]).all(axis=1).any():
            kept.append(int(at))
    return [(int(pairs[at, 0]), int(pairs[at, 1])) for at in kept]
