"""The best strategies of consecutive units within one stage: exact label setting under memory and bounds.

Takes a Chain: the classes of a stage's units in order, their options, and what a segment may cost; gives, for every
number of layers k, entry and last layouts (one of each a chunk, ``borders``), the least work that fits.

A label is a chain of options so far: its entry and last layouts, work, held bytes and largest transient (a maximum,
kept as its rank among the options').  A chain fits when held + transient does.  Exactness: extending two chains of
equal length, entry and last layouts by the same options adds the same work and bytes to both and keeps the order of
their maxima, so a chain that another equals or beats in all three can never become better; and a chain whose dual bound
(``bounds``) exceeds what any segment may cost cannot be part of a better plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from galvatron.cost.strategies import Floats, Ints
from galvatron.plan.schedules import InFlight

from .borders import ANY, Borders
from .labels import Labels, fastest, near_front, undominated
from .space import Options

FEW_LABELS = 256  # these are compared at once, without binning

MAX_CANDIDATES = 16
"""How many times as many labels as may stay are compared with each other."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How many labels a chain may have: ``labels`` shared out evenly among its lengths, ``least`` to ``most`` of each.

    Beyond it the answer is no longer proven exact.  ``bounds``: the fastest of nearly equal bytes stands for the
    others as if it held the least of them, so that what the chains come to is a bound, and what of them truly fits an
    answer.  Else half of those that stay are such fastest ones, half those of the lowest dual bounds, all with bytes
    of their own: it finds better answers among few labels but bounds nothing.  ``whole``: beyond it TooManyLabels is
    raised.
    """

    labels: int
    least: int
    most: int
    bounds: bool
    whole: bool = False

    def of_each(self, lengths: int) -> int:
        """Labels of one length."""
        return min(max(self.labels // lengths, self.least), self.most)


FULL_EFFORT = Effort(100_000, 2_000, 5_000, True)
GREAT_EFFORT = Effort(400_000, 8_000, 20_000, True)
LITTLE_EFFORT = Effort(5_000, 100, 1_000, False)
FEW_EFFORT = Effort(10_000, 200, 500, True)
WHOLE_EFFORT = replace(FULL_EFFORT, whole=True)


class TooManyLabels(Exception):
    """A chain cannot be solved with the labels that it may have without taking some as one."""


@dataclass(frozen=True)
class ClassOptions:
    """The options of one class of units: work, held bytes, rank of the transient, layout, and moves into it."""

    options: Options
    held: Ints
    rank: Ints
    moves_s: Floats

    @cached_property
    def moved_s(self) -> Floats:
        """moved_s[layout before, option]."""
        return self.moves_s[:, self.options.layout]


@dataclass(frozen=True)
class Goal:
    """One number of layers to reach: ``room`` for held bytes and transient, ``most_s`` for the work, and what the
    units after every layer (and before any) still take at least: ``least_s[j, λ]`` and ``least_held[j]``."""

    room: int
    most_s: float
    least_s: Floats
    least_held: Ints

    def most(self, prices: Floats) -> Floats:
        """most[j, λ]: the most of work + λ · peak after j units that leaves the goal in reach."""
        return self.most_s + prices * self.room - self.least_s

    @property
    def rooms(self) -> Ints:
        """rooms[j]: the most that j units may hold with the transient."""
        return self.room - self.least_held


@dataclass(frozen=True)
class Reach:
    """How far labels may go: ``most[λ]`` of work + λ · peak, and ``room`` for the peak."""

    most: Floats
    room: int


@dataclass(frozen=True)
class Chain:
    """A stage's units: maybe an embedding, layers by class, maybe a head after every goal.

    ``transients``: of all classes' options, ascending; ``prices``: λ of the dual; ``entries[entry, chunk]``: layouts in
    which hidden states may come in (ANY before an embedding, which takes none); ``starts``: how many layers are before
    every chunk but the first.
    """

    classes: dict[int, ClassOptions]
    embedding: int | None
    layers: list[int]
    head: int | None
    goals: dict[int, Goal]
    entries: Ints
    borders: Borders
    starts: tuple[int, ...]
    transients: Ints
    prices: Floats
    num_layouts: int
    effort: Effort

    def moves_into(self, done: int) -> bool:
        """Whether there is a layout to change from before the unit that makes ``done`` layers, or them and a head."""
        if self.embedding is not None and done <= 1:
            return done == 1
        starts = (0, *self.starts)
        return done - 1 not in starts or bool(self.entries[0, starts.index(done - 1)] != ANY)

    @cached_property
    def reaches(self) -> list[Reach]:
        """reaches[j]: after j layers, what leaves any goal of as many or more in reach."""
        most = np.full((max(self.goals) + 1, len(self.prices)), -np.inf)
        room = np.full(len(most), np.iinfo(np.int64).min)
        for k, goal in self.goals.items():
            np.maximum(most[: k + 1], goal.most(self.prices)[: k + 1], out=most[: k + 1])
            np.maximum(room[: k + 1], goal.rooms[: k + 1], out=room[: k + 1])
        return [Reach(*at) for at in zip(most, room.tolist(), strict=True)]

    def reach_of_head(self, k: int) -> Reach:
        """After the head that follows ``k`` layers."""
        goal = self.goals[k]
        return Reach(goal.most(self.prices)[k + 1], int(goal.rooms[k + 1]))

    @cached_property
    def critical(self) -> int:
        """The price at which the chain's dual bound leaves least to spare."""
        spare = [goal.most_s + self.prices * goal.room - goal.least_s[0] for goal in self.goals.values()]
        return int(np.max(spare, axis=0).argmin())


@dataclass
class Grown:
    """For every goal k: work[entry, code of the last layouts] and the label that has it; ``history`` leads back.

    ``bound_s[k]``: what no chain's work is below; where labels were ``merged`` it is less than ``work_s[k]``.
    """

    chain: Chain
    history: list[tuple[int, Labels]]
    work_s: dict[int, Floats]
    bound_s: dict[int, Floats]
    label: dict[int, Ints]
    ends: dict[int, Labels]
    merged: bool = False

    def options(self, k: int, entry: int, last: int) -> list[tuple[int, int]]:
        """(class, option) of the best chain's units, in order."""
        label = int(self.label[k][entry, last])
        steps = self.history[: k + (self.chain.embedding is not None)]
        chosen = []
        if self.chain.head is not None:
            end = self.ends[k]
            chosen.append((self.chain.head, int(end.option[label])))
            label = int(end.parent[label])
        for unit, labels in reversed(steps):
            chosen.append((unit, int(labels.option[label])))
            label = int(labels.parent[label])
        return chosen[::-1]

    def true_bytes(self, ends: Labels | None) -> tuple[Ints, Ints]:
        """(held, rank) of the chains behind the last labels, or behind ``ends`` after them, as if none were merged."""
        steps = self.history + ([(self.chain.head, ends)] if ends is not None and self.chain.head is not None else [])
        held, rank = np.zeros((2, len(self.chain.entries)), dtype=np.int64)
        for unit, labels in steps:
            own = self.chain.classes[unit]
            held = held[labels.parent] + own.held[labels.option]
            rank = np.maximum(rank[labels.parent], own.rank[labels.option])
        return held, rank


def grow(chain: Chain) -> Grown:
    """Label setting over the chain's units."""
    count = len(chain.entries)
    zero, layout = np.zeros(count, dtype=np.int64), np.maximum(chain.entries[:, 0], 0)
    labels = Labels(np.arange(count), layout, np.zeros(count), zero, zero, zero, zero)
    grown = Grown(chain, [], {}, {}, {}, {})
    if chain.embedding is not None:
        labels = _step(grown, labels, chain.embedding, 0, chain.reaches[0])
        grown.history.append((chain.embedding, labels))
    for j, unit in enumerate(chain.layers, start=1):
        if j - 1 in chain.starts:
            labels = _in_next_chunk(chain, labels, 1 + chain.starts.index(j - 1))
        labels = _step(grown, labels, unit, j, chain.reaches[j])
        grown.history.append((unit, labels))
        if j in chain.goals:
            ends, end = labels, None
            if chain.head is not None:
                ends = end = grown.ends[j] = _step(grown, labels, chain.head, j + 1, chain.reach_of_head(j))
            room = chain.goals[j].room
            grown.work_s[j], grown.label[j] = grown.bound_s[j], _ = _table(chain, ends, room)
            if grown.merged and chain.effort.bounds:
                held, rank = grown.true_bytes(end)
                grown.work_s[j], grown.label[j] = _table(chain, replace(ends, held=held, rank=rank), room)
    return grown


def _in_next_chunk(chain: Chain, labels: Labels, chunk: int) -> Labels:
    """The same where hidden states leave ``chunk`` - 1 and come in again: how they left becomes a part of the entry."""
    first = labels.entry // len(chain.borders.layouts) ** (chunk - 1)
    return replace(labels, entry=chain.borders.after(labels.entry, labels.layout), layout=chain.entries[first, chunk])


def _step(grown: Grown, before: Labels, unit: int, done: int, reach: Reach) -> Labels:
    """The labels of all chains ``before`` plus one option of ``unit``, after which ``done`` layers are done."""
    chain = grown.chain
    (found, excess), most = _extended(chain, before, unit, done, reach), chain.effort.of_each(len(chain.layers))
    if len(found) > FEW_LABELS:
        near = near_front(found, chain.num_layouts)
        found, excess = _at_most(grown, found.take(near), excess[near], MAX_CANDIDATES * most)
    kept = undominated(found, chain.num_layouts)
    return _at_most(grown, found.take(kept), excess[kept], most)[0]


def _at_most(grown: Grown, labels: Labels, excess: Floats, most: int) -> tuple[Labels, Floats]:
    """The labels, merged where they are too many."""
    if len(labels) <= most:
        return labels, excess
    if grown.chain.effort.whole:
        raise TooManyLabels
    grown.merged, chain = True, grown.chain
    if chain.effort.bounds:
        kept, held, rank = fastest(labels, chain.transients, chain.num_layouts, most)
        return replace(labels.take(kept), held=held, rank=rank), excess[kept]
    spread, _, _ = fastest(labels, chain.transients, chain.num_layouts, most // 2)
    kept = np.union1d(spread, np.argpartition(excess, most // 2)[: most // 2])
    return labels.take(kept), excess[kept]


def _extended(chain: Chain, before: Labels, unit: int, done: int, reach: Reach) -> tuple[Labels, Floats]:
    """Every label with every option of ``unit`` that is within ``reach``, and how far its dual bound is beyond.

    One price is tried on all pairs, that which leaves least to spare; the others on the pairs that pass it.
    """
    own, prices, first = chain.classes[unit], chain.prices, chain.critical
    work = before.work_s[:, None] + own.options.work_s
    if chain.moves_into(done):
        work += own.moved_s[before.layout]
    peak = np.maximum(chain.transients[before.rank][:, None], chain.transients[own.rank])
    peak += before.held[:, None]
    peak += own.held
    excess = prices[first] * peak
    excess += work
    excess -= reach.most[first]
    parent, option = np.nonzero((excess <= 0) & (peak <= reach.room))
    work, excess = work[parent, option], excess[parent, option]
    if len(prices) > 1:
        excess = (work + np.multiply.outer(prices, peak[parent, option]) - reach.most[:, None]).max(axis=0)
        within = np.flatnonzero(excess <= 0)
        parent, option, work, excess = parent[within], option[within], work[within], excess[within]
    held, rank = before.held[parent] + own.held[option], np.maximum(before.rank[parent], own.rank[option])
    layout = own.options.layout[option]
    return Labels(before.entry[parent], layout, work, held, rank, parent, option), excess


def undominated_options(options: Options, in_flight: InFlight, num_layouts: int) -> Ints:
    """Indices of the options that no other of the same layout equals or beats in work, bytes and transient."""
    _, rank = np.unique(options.transient_bytes, return_inverse=True)
    zero = np.zeros(len(options), dtype=np.int64)
    held = options.held_bytes(in_flight)
    labels = Labels(zero, options.layout, options.work_s, held, rank.astype(np.int64), zero, zero)
    return undominated(labels, num_layouts)


def _table(chain: Chain, labels: Labels, room: int) -> tuple[Floats, Ints]:
    """The least work that fits by (entry, last layouts), and its label; nothing follows a head, whatever its layout."""
    size = len(chain.entries) * len(chain.borders)
    work, label = np.full(size, np.inf), np.zeros(size, dtype=np.int64)
    order = np.argsort(-labels.work_s, kind="stable")
    order = order[labels.held[order] + chain.transients[labels.rank[order]] <= room]
    last = labels.layout[order] if chain.head is None else chain.borders.layouts[0]
    at = chain.borders.after(labels.entry[order], last)
    work[at], label[at] = labels.work_s[order], order
    shape = (len(chain.entries), len(chain.borders))
    return work.reshape(shape), label.reshape(shape)
