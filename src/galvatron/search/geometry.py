"""Which layers each stage may hold, and what is equal about them: the shape of one task's divisions.

Takes a Setting; gives, for every stage and every segment of layers it may hold, the classes of its units (a unit with
its microbatches in flight), what the segment receives and what it holds beside its units.  Knows nothing of
strategies.

A segment is (row, k): k layers from a first one.  Where all layers are equal, where they begin makes no difference
and there is one row; else row i begins with layer i.  An interleaved stage holds v chunks, as equal as k allows, the
larger ones first, and at most a layer a chunk more or less than the mean; with several kinds of layers its k is settled
beforehand, so that its layers are known.
"""

from __future__ import annotations

import itertools
import math
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from galvatron.core.model import ENDS, UnitName
from galvatron.cost.communication import transfer_s
from galvatron.cost.joints import Between
from galvatron.cost.memory import shared_bytes
from galvatron.cost.setting import Setting
from galvatron.cost.strategies import Floats, Ints, Strategies
from galvatron.plan.plan import LayerStrategy
from galvatron.plan.schedules import InFlight, in_flight, on_their_way


@dataclass(frozen=True, slots=True)
class UnitClass:
    """A unit with the microbatches whose activations it holds at the stage's peak."""

    unit: UnitName
    in_flight: InFlight


@dataclass(frozen=True)
class StageShape:
    """One stage's segments, as arrays over [row, k].

    ``counts[row, k, class]``: units of every class; ``received_s``: what its messages add to the work;
    ``beside_bytes``: outputs and shared tensors of the microbatches in flight, and gradients on their way.
    """

    classes: tuple[UnitClass, ...]
    allowed: NDArray[np.bool_]
    counts: Ints
    received_s: Floats
    beside_bytes: Ints


class Geometry:
    """The stages of one task, without what runs between stacks (``with_embedding``)."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.pp = setting, setting.pp
        self.kinds = [kind.name for kind in setting.model.spec.kind_of_layers()]
        self.num_layers = len(self.kinds)
        self.one_kind = len(set(self.kinds)) == 1
        self.interleaved = setting.model_chunks > 1
        self.rows = 1 if (self.one_kind and not setting.model.spec.joints) or self.interleaved else self.num_layers
        self.stages = [self._stage(stage) for stage in range(self.pp)]

    def with_embedding(self, strategy: LayerStrategy) -> Geometry:
        """The same with what runs between stacks, as the embedding does, and with copies of tables."""
        (stays, each), which = self.between_bytes(Strategies.of([strategy])), self._between[0]
        found = copy(self)
        found.stages = [
            replace(shape, beside_bytes=shape.beside_bytes + (stays + held.alive * each)[which, 0])
            for shape, (held,) in zip(self.stages, self._held, strict=True)
        ]
        return found

    def between_bytes(self, embeddings: Strategies) -> tuple[Ints, Ints]:
        """[sort of segment, strategy]: what stays beyond the units, and what a microbatch keeps (``cost.joints``)."""
        found = [b.held_bytes(self.setting, embeddings) for b in self._between[1]]
        stays, each = (np.array(column) for column in zip(*found, strict=True))
        return stays, each

    @cached_property
    def _between(self) -> tuple[Ints, list[Between]]:
        """[first layer, k]: which sort a segment is, by where stacks begin in it; of every sort what it holds."""
        starts = np.array([stack.start for stack in self.setting.model.spec.stack_ranges] + [self.num_layers])
        at = np.arange(self.num_layers + 1)
        stack = np.searchsorted(starts, at, side="right") - 1
        place = 2 * stack + (at > starts[stack])  # at the first layer of a stack, or further in
        first, k = np.nonzero((at[:-1, None] + at <= self.num_layers) & (at > 0))
        pair = place[first] * 2 * len(starts) + place[first + k]
        _, one, sort = np.unique(pair, return_index=True, return_inverse=True)
        which = np.zeros((self.num_layers, self.num_layers + 1), dtype=np.int64)
        which[first, k] = sort
        return which, [Between(range(first[i], first[i] + k[i])) for i in one]

    def row(self, start: int) -> int:
        """The row of segments that begin with layer ``start``."""
        return start if self.rows > 1 else 0

    def chunk_sizes(self, k: int) -> list[int]:
        """Layers of every chunk of a stage with ``k`` layers."""
        v = self.setting.model_chunks
        return [k // v + (chunk < k % v) for chunk in range(v)]

    @cached_property
    def balanced(self) -> tuple[int, ...]:
        """Layers of every stage, as equal as possible, the larger stages in the middle (the ends have more to do)."""
        base, left = divmod(self.num_layers, self.pp)
        first = (self.pp - left) // 2
        return tuple(base + (first <= stage < first + left) for stage in range(self.pp))

    @cached_property
    def _held(self) -> list[tuple[InFlight, ...]]:
        s = self.setting
        return [in_flight(s.schedule, s.pp, stage, s.num_microbatches, s.model_chunks) for stage in range(s.pp)]

    @cached_property
    def _received(self) -> dict[UnitName, float]:
        """What a message of the hidden states that enter a unit adds to the work of a stage it is sent to."""
        setting = self.setting
        return {unit: setting.received_s(transfer_s(setting, unit)) for unit in {*self.kinds, "head"}}

    @cached_property
    def _entering_bytes(self) -> dict[UnitName, int]:
        return {unit: self.setting.entering_bytes(unit) for unit in {*self.kinds, "head"}}

    @cached_property
    def _shared_bytes(self) -> int:
        return shared_bytes(self.setting)

    def layers_of(self, stage: int, row: int, k: int) -> list[tuple[UnitName, int]]:
        """(kind, chunk) of a segment's layers, in forward order."""
        if not self.interleaved:
            start = row if self.rows > 1 else 0
            return [(self.kinds[i], 0) for i in range(start, start + k)]
        if self.one_kind:
            return [(self.kinds[0], chunk) for chunk, size in enumerate(self.chunk_sizes(k)) for _ in range(size)]
        return [(self.kinds[i], chunk) for chunk, members in enumerate(self._settled(stage)) for i in members]

    def class_of(self, stage: int, kind: UnitName, chunk: int) -> int:
        """The class of a layer of one chunk of ``stage``."""
        return self.stages[stage].classes.index(UnitClass(kind, self._held[stage][chunk]))

    def _settled(self, stage: int) -> list[range]:
        """The layers of every chunk of ``stage`` where all stages have their balanced number."""
        sizes = [self.chunk_sizes(k)[chunk] for chunk in range(self.setting.model_chunks) for k in self.balanced]
        starts = [0, *itertools.accumulate(sizes)]
        return [range(starts[entry], starts[entry + 1]) for entry in range(stage, len(sizes), self.pp)]

    def _stage(self, stage: int) -> StageShape:
        held = self._held[stage]
        classes = [UnitClass(name, count) for name in dict.fromkeys(self.kinds) for count in dict.fromkeys(held)]
        if stage == 0:
            classes.append(UnitClass("embedding", held[0]))
        if stage == self.pp - 1:
            classes.append(UnitClass("head", held[-1]))
        fill = self._ranges if self.rows > 1 else self._equal_layers if self.one_kind else self._one_segment
        allowed, counts, received_s, beside = fill(stage, classes)
        for at, unit in enumerate(classes):
            if unit.unit in ENDS:
                counts[..., at] = 1
        return StageShape(tuple(classes), allowed, counts, received_s, beside)

    def _empty(self, classes: list[UnitClass]) -> tuple[NDArray[np.bool_], Ints, Floats, Ints]:
        shape = (self.rows, self.num_layers + 1)
        counts = np.zeros((*shape, len(classes)), dtype=np.int64)
        return np.zeros(shape, dtype=bool), counts, np.zeros(shape), np.zeros(shape, dtype=np.int64)

    def _equal_layers(self, stage: int, classes: list[UnitClass]) -> tuple[NDArray[np.bool_], Ints, Floats, Ints]:
        """Every k of a model of one kind: chunks as equal as they can be, the same messages whatever k."""
        allowed, counts, received, beside = self._empty(classes)
        held = self._held[stage]
        lengths = np.array([k for _, k in self._segments(stage)])
        allowed[0, lengths] = True
        for chunk, count in enumerate(held):
            at = classes.index(UnitClass(self.kinds[0], count))
            counts[0, :, at] += (np.arange(self.num_layers + 1) + len(held) - 1 - chunk) // len(held)
        received[0], beside[0] = self._edges(stage, [(self.kinds[0], self.kinds[0])] * len(held))
        return allowed, counts, received, beside

    def _one_segment(self, stage: int, classes: list[UnitClass]) -> tuple[NDArray[np.bool_], Ints, Floats, Ints]:
        """The settled layers of an interleaved stage of a model of several kinds."""
        allowed, counts, received, beside = self._empty(classes)
        chunks, k, kinds = self._settled(stage), self.balanced[stage], [*self.kinds, "head"]
        allowed[0, k] = True
        for kind, chunk in self.layers_of(stage, 0, k):
            counts[0, k, classes.index(UnitClass(kind, self._held[stage][chunk]))] += 1
        received[0, k], beside[0, k] = self._edges(stage, [(kinds[c.start], kinds[c.stop]) for c in chunks])
        return allowed, counts, received, beside

    def _ranges(self, stage: int, classes: list[UnitClass]) -> tuple[NDArray[np.bool_], Ints, Floats, Ints]:
        """Every range of layers of a model of several kinds."""
        allowed, counts, received, beside = self._empty(classes)
        (held,), layers = self._held[stage], self.num_layers
        rows, lengths = (np.array(axis) for axis in zip(*self._segments(stage), strict=True))
        ends = rows + lengths
        allowed[rows, lengths] = True
        for at, unit in enumerate(classes):
            before = np.concatenate(([0], np.cumsum([kind == unit.unit for kind in self.kinds])))
            counts[rows, lengths, at] = before[ends] - before[rows]
        entering = np.array([self._received[kind] for kind in self.kinds] + [0.0])
        output = np.array([self._entering_bytes[kind] for kind in self.kinds] + [0])
        is_last = ends == layers
        received[rows, lengths] = (stage > 0) * entering[rows] + np.where(is_last, 0.0, entering[ends])
        shared, sent = (self._shared_bytes, output[rows]) if stage > 0 else (0, 0)
        beside[rows, lengths] = sent + held.alive * (shared + np.where(is_last, 0, output[ends]))
        return allowed, counts, received, beside

    def _segments(self, stage: int) -> list[tuple[int, int]]:
        pp, last = self.pp, self.num_layers - self.pp + 1
        if self.interleaved and not self.one_kind:
            return [(0, self.balanced[stage])]
        if self.interleaved:
            v, mean = self.setting.model_chunks, self.num_layers / pp
            first, most = max(v, math.ceil(mean) - v), min(math.floor(mean) + v, self.num_layers - v * (pp - 1))
            return [(0, k) for k in range(first, most + 1)]
        if self.rows == 1:
            return [(0, k) for k in range(last if pp == 1 else 1, last + 1)]
        behind = pp - 1 - stage
        starts = range(1) if stage == 0 else range(stage, self.num_layers - behind)
        ends = {i: range(i + 1, self.num_layers - behind + 1) for i in starts}
        if behind == 0:
            ends = {i: range(self.num_layers, self.num_layers + 1) for i in starts}
        return [(i, end - i) for i in starts for end in ends[i]]

    def _edges(self, stage: int, neighbours: list[tuple[UnitName, UnitName]]) -> tuple[float, int]:
        """(work of the messages that a stage receives, bytes that it holds beside its units).

        ``neighbours``: for every chunk, the kind of its first layer and of the layer that follows it.
        """
        last, received_s, beside = self.setting.model_chunks - 1, 0.0, 0
        ahead = on_their_way(self.pp, self.setting.model_chunks)
        for chunk, (first, after) in enumerate(neighbours):
            entry = chunk * self.pp + stage
            held = self._held[stage][chunk].alive
            if entry > 0:
                received_s += self._received[first]
                beside += held * self._shared_bytes + self._entering_bytes[first] * ahead
            if entry < last * self.pp + self.pp - 1:
                received_s += self._received[after]
                beside += held * self._entering_bytes[after]
        return received_s, beside
