"""The chains of one stage that may be part of a plan: equal segments together, options and goals by the dual bound.

Takes a Space, a stage's bound and what its segments may take; gives Chains.  Knows nothing of other stages.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from galvatron.core.model import ENDS, UnitName
from galvatron.cost.strategies import Floats, Ints

from .borders import Borders
from .bounds import StageBound
from .geometry import Geometry
from .layers import Chain, ClassOptions, Effort, Goal, undominated_options
from .space import Options, Space


@dataclass(frozen=True)
class StageChains:
    """Of stage ``stage`` of ``space``; ``most_s``: what every segment's work may be, by [row, k]."""

    space: Space
    stage: int
    bound: StageBound
    most_s: Floats

    @property
    def geometry(self) -> Geometry:
        """Of the space."""
        return self.space.geometry

    @property
    def layouts(self) -> Ints:
        """Those of the options of layers that may be part of a plan."""
        worth = np.zeros(len(self.space.layouts), dtype=bool)
        for level in range(len(self.bound.level_s)):
            for members in self.alike(level):
                layers, ends = self._units(members)
                goals = self._goals(level, members, layers, ends)
                for at in {*layers}:
                    worth[self._options(level, at, goals, ends).layout] = True
        return np.flatnonzero(worth)

    def alike(self, level: int) -> list[list[tuple[int, int]]]:
        """Segments (row, k) worth solving at a level, those together whose units are the first of one chain."""
        level_s = self.bound.level_s[level]
        worth = np.isfinite(level_s) & (level_s <= self.most_s)
        groups: dict[tuple[object, ...], list[tuple[int, int]]] = {}
        for row in np.flatnonzero(worth.any(axis=1)).tolist():
            lengths = np.flatnonzero(worth[row]).tolist()
            for k in lengths:
                longest = k if self.geometry.interleaved else lengths[-1]
                layers = tuple(self.geometry.layers_of(self.stage, row, longest))
                after = self.geometry.kinds[row + longest : row + longest + 1] if self.geometry.rows > 1 else ()
                groups.setdefault((layers, *after), []).append((row, k))
        return list(groups.values())

    def _units(self, members: list[tuple[int, int]]) -> tuple[list[int], dict[UnitName, int]]:
        """The classes of the layers of the longest of ``members`` (row, k), and of the stage's ends."""
        row, longest = max(members, key=lambda member: member[1])
        layers = [
            self.geometry.class_of(self.stage, *layer) for layer in self.geometry.layers_of(self.stage, row, longest)
        ]
        classes = self.bound.shape.classes
        return layers, {unit.unit: at for at, unit in enumerate(classes) if unit.unit in ENDS}

    def chain(
        self,
        level: int,
        members: list[tuple[int, int]],
        entries: Ints,
        borders: Borders,
        effort: Effort,
    ) -> Chain | None:
        """The chain that serves all ``members`` (row, k): equal layers up to the longest.

        It has the options up to ``level``, of which what is below the level counts as its least.
        """
        shape = self.bound.shape
        layers, ends = self._units(members)
        goals = self._goals(level, members, layers, ends)
        used = sorted({*layers, *ends.values()})
        options = {at: self._options(level, at, goals, ends) for at in used}
        if not all(len(chosen) for chosen in options.values()):
            return None
        floor = self._least_transient(options, ends, goals, layers)
        above = {at: np.maximum(chosen.transient_bytes, floor) for at, chosen in options.items()}
        transients = np.unique(np.concatenate(list(above.values())))
        classes = {
            at: ClassOptions(
                chosen,
                chosen.held_bytes(shape.classes[at].in_flight),
                np.searchsorted(transients, above[at]).astype(np.int64),
                self.space.moves_s.get(shape.classes[at].unit, np.zeros((0, 0))),
            )
            for at, chosen in options.items()
        }
        prices, size = self.bound.prices, len(self.space.layouts)
        first, last = ends.get("embedding"), ends.get("head")
        starts = tuple(itertools.accumulate(self.geometry.chunk_sizes(len(layers))[:-1]))
        return Chain(classes, first, layers, last, goals, entries, borders, starts, transients, prices, size, effort)

    @staticmethod
    def _least_transient(
        options: dict[int, Options], ends: dict[UnitName, int], goals: dict[int, Goal], layers: list[int]
    ) -> int:
        """A transient that every chain has anyway, by the units that all of them hold: smaller ones count as that."""
        always = {*ends.values(), *layers[: min(goals)]}
        return max(int(options[at].transient_bytes.min()) for at in always)

    def _goals(
        self, level: int, members: list[tuple[int, int]], layers: list[int], ends: dict[UnitName, int]
    ) -> dict[int, Goal]:
        """What every number of layers among ``members`` may take, and what remains after each layer."""
        bound, goals = self.bound, {}
        for k in sorted({k for _, k in members}):
            rows = [row for row, length in members if length == k]
            units = [*layers[:k], *([ends["head"]] if "head" in ends else [])]
            least_s, least_held = _sums_from(bound.least_s[level, units]), _sums_from(bound.least_held[level, units])
            most_s = max(float(self.most_s[row, k] - bound.shape.received_s[row, k]) for row in rows)
            room = self.space.usable_bytes - int(bound.shape.beside_bytes[rows[0], k])
            goals[k] = Goal(room, most_s, least_s, least_held)
        return goals

    def _options(self, level: int, at: int, goals: dict[int, Goal], ends: dict[UnitName, int]) -> Options:
        """The options of a class that may be part of some goal by the dual bound, and are not dominated."""
        bound, unit = self.bound, self.bound.shape.classes[at]
        options = self.space.options[unit.unit]
        options = options.take(np.flatnonzero(options.transient_bytes <= bound.largest[level]))
        counted = np.maximum(options.transient_bytes, bound.least_transient[level])
        options, peak = replace(options, transient_bytes=counted), options.held_bytes(unit.in_flight) + counted
        least_s, least_held = bound.least_s[level], bound.least_held[level]
        embedding = [ends["embedding"]] if "embedding" in ends else []
        first_s = least_s[embedding].sum(axis=0) - least_s[at]
        first_held = int(least_held[embedding].sum()) - int(least_held[at])
        kept = peak <= max(goal.room - int(goal.least_held[0]) - first_held for goal in goals.values())
        limits = [goal.most_s + bound.prices * goal.room - goal.least_s[0] - first_s for goal in goals.values()]
        for price, limit in zip(bound.prices, np.max(limits, axis=0), strict=True):
            kept &= options.work_s + price * peak <= limit
        options = options.take(np.flatnonzero(kept))
        return options.take(undominated_options(options, unit.in_flight, len(self.space.layouts)))


def _sums_from(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """sums[j] of the values from j on; 0 after the last."""
    return np.cumsum(np.concatenate((values, np.zeros_like(values[:1])))[::-1], axis=0)[::-1]
