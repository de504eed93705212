"""The best strategies of consecutive layers within one stage, for every number of layers: exact label setting.

Takes one task's layer options and how many microbatches are in flight; gives, for every number of layers k,
entry layout a and last layout b, the Pareto front of chains in three resources: seconds, held bytes (a sum) and
the largest transient (a maximum, kept as its rank among the options').  A chain fits when held + transient does.

Layers are equal, so one front serves every stage with as many microbatches in flight.  Exactness: extending two
chains of equal k, a, b by the same layers adds the same seconds and bytes to both and keeps the order of their
maxima, so a chain that is no better in any of the three can never become better.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .space import Floats, Ints, Options


@dataclass(frozen=True)
class Front:
    """Labels of one (k, a, b), none dominated.

    ``rank`` is that of the largest transient so far; ``parent`` points into the front of ``parent_layout`` at
    k - 1, and ``option`` is the last layer's strategy.
    """

    time_s: Floats
    held_bytes: Ints
    rank: Ints
    parent_layout: Ints
    parent: Ints
    option: Ints


@dataclass(frozen=True)
class Chains:
    """Fronts by ``[k - 1][a][b]``, over ``options`` whose transients in ascending order are ``transients``."""

    options: Options
    transients: Ints
    fronts: list[list[list[Front]]]

    def strategies(self, k: int, entry: int, last: int, label: int) -> list[int]:
        """The options of a label's k layers, first to last."""
        chosen = []
        for length in range(k, 0, -1):
            front = self.fronts[length - 1][entry][last]
            chosen.append(int(front.option[label]))
            last, label = int(front.parent_layout[label]), int(front.parent[label])
        return chosen[::-1]


def grow(
    options: Options, in_flight: int, moves_s: Floats, usable_bytes: int, lengths: range, floor_bytes: int = 0
) -> Chains:
    """Chains up to the longest of ``lengths``; those that cannot reach the shortest within memory are dropped.

    ``floor_bytes``: a transient so small that it makes no difference; smaller ones count as that.
    """
    held, transient = options.held_bytes(in_flight), np.maximum(options.transient_bytes, floor_bytes)
    kept = undominated(options.work_s, held, transient, options.layout)
    options, held = options.take(kept), held[kept]
    transients, rank = np.unique(transient[kept], return_inverse=True)
    rank = rank.astype(np.int64)
    least = int(held.min()) if len(held) else 0
    size = len(moves_s)
    by_layout = [np.flatnonzero(options.layout == b) for b in range(size)]
    fronts: list[list[list[Front]]] = []
    before = [[_start() if b == a else _EMPTY for b in range(size)] for a in range(size)]
    for k in range(1, lengths.stop):
        room = usable_bytes - max(lengths.start - k, 0) * least - transients
        step = _Step(options.work_s, held, rank, room, moves_s)
        before = [[step.extend(before[a], b, by_layout[b]) for b in range(size)] for a in range(size)]
        fronts.append(before)
    return Chains(options, transients, fronts)


_NONE = np.zeros(0, dtype=np.int64)
_EMPTY = Front(np.zeros(0), _NONE, _NONE, _NONE, _NONE, _NONE)


def _start() -> Front:
    zero = np.zeros(1, dtype=np.int64)
    return Front(np.zeros(1), zero, zero, zero, zero, zero)


@dataclass(frozen=True, slots=True)
class _Step:
    """One more layer: every option's seconds, held bytes and transient rank; ``room[rank]`` for held bytes."""

    work_s: Floats
    held: Ints
    rank: Ints
    room: Ints
    moves_s: Floats

    def extend(self, before: list[Front], layout: int, choices: Ints) -> Front:
        """The front of all chains ``before`` (by last layout) plus one of ``choices``, all of ``layout``."""
        parts = [self._products(front, b, layout, choices) for b, front in enumerate(before) if len(front.time_s)]
        if not parts or not len(choices):
            return _EMPTY
        time, *rest = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        kept = pareto(time, rest[0], rest[1])
        held, rank, parent_layout, parent, option = (column[kept] for column in rest)
        return Front(time[kept], held, rank, parent_layout, parent, option)

    def _products(
        self, front: Front, b: int, layout: int, choices: Ints
    ) -> tuple[Floats, Ints, Ints, Ints, Ints, Ints]:
        held = (front.held_bytes[:, None] + self.held[choices]).ravel()
        rank = np.maximum(front.rank[:, None], self.rank[choices]).ravel()
        time = (front.time_s[:, None] + (self.work_s[choices] + self.moves_s[b, layout])).ravel()
        fits = np.flatnonzero(held <= self.room[rank])
        parent, option = np.divmod(fits, max(len(choices), 1))
        return time[fits], held[fits], rank[fits], np.full(len(fits), b), parent, choices[option]


def pareto(time_s: Floats, held_bytes: Ints, rank: Ints) -> Ints:
    """Indices, by time, of the labels that no other equals or beats in all three.

    Of two equal in time and bytes both may stay; the front is then no longer minimal, but as good.
    """
    order = np.lexsort((held_bytes, time_s))
    held, ranks = held_bytes[order], rank[order]
    kept = np.zeros(len(order), dtype=bool)
    for level in np.unique(ranks):
        reachable = np.where(ranks <= level, held, np.iinfo(np.int64).max)
        best = np.minimum.accumulate(reachable)
        first = np.concatenate(([True], held[1:] < best[:-1]))
        kept |= (ranks == level) & first
    return order[kept]


def undominated(work_s: Floats, held_bytes: Ints, transient_bytes: Ints, layout: Ints) -> Ints:
    """Indices of the options that no option of the same layout equals or beats in all three, ascending."""
    kept = [np.zeros(0, dtype=np.int64)]
    for b in np.unique(layout):
        members = np.flatnonzero(layout == b)
        kept.append(members[pareto(work_s[members], held_bytes[members], transient_bytes[members])])
    return np.sort(np.concatenate(kept))
