"""The stages of one task solved: tables from chains of options, then the division among stages.

Takes a Space with its bounds and the most that a plan may cost; gives the best plan of what that leaves.  Segments,
options and chains that cannot be part of such a plan are left out before they cost anything.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Literal

import numpy as np

from galvatron.core.model import ENDS, UnitName
from galvatron.cost.step import objective_s
from galvatron.cost.strategies import Floats, Ints
from galvatron.plan.plan import LayerStrategy

from .borders import ANY, MOST, Borders
from .bounds import StageBound, first_alike, of_any
from .chains import StageChains
from .layers import FEW_EFFORT, FULL_EFFORT, Effort, Grown, TooManyLabels, grow
from .patience import ENDLESS, Patience
from .solution import Solution, grouped
from .space import Space
from .stages import Division, Tables, divide
from .windows import most_work_s

Found = dict[tuple[int, int], list[Grown]]
"""By (row, k) the chains of a segment."""

GOOD = 1e-3  # a gap that is good where labels are many
ROUNDING = 1 + 1e-9  # what a chain may cost is stretched by this much, so that rounding cuts off nothing


class TaskSolver:
    """The tables of one task's stages, without what cannot be part of a plan of value ``at_most``.

    ``bound_s``: what no plan is below, as far as it says anything below ``at_most``.  ``merged``: it may be less than
    the value of the best plan, because chains were merged for their number.
    """

    def __init__(
        self,
        space: Space,
        bounds: list[StageBound],
        at_most: float,
        effort: Effort = FULL_EFFORT,
        patience: Patience = ENDLESS,
    ) -> None:
        self.patience = patience
        self.space, self.geometry, self.bounds, self.effort = space, space.geometry, bounds, effort
        self.at_most, self.merged, self.bound_s = at_most, False, math.inf
        self.allowed_s = most_work_s(self.geometry, self.bounds, at_most * ROUNDING)
        self.most_s = self.allowed_s
        self._first = first_alike(bounds) if self.geometry.rows > 1 else list(range(len(bounds)))
        self._alike = {first: [at for at, other in enumerate(self._first) if other == first] for first in self._first}
        self._of_any = {first: of_any([bounds[at] for at in alike]) for first, alike in self._alike.items()}

    def solve(self) -> Solution | None:
        """The best plan of what is left; None when there is none."""
        best = self._solve()
        if self.merged and not self.effort.bounds:
            self.bound_s = -math.inf
        return best

    def _solve(self) -> Solution | None:
        chunks, layouts = self.space.task.model_chunks, self.space.layer_layouts
        if chunks == 1 or len(layouts) == 1:
            return self._solve_with(Borders(layouts, chunks), self.effort)
        return self._solve_mixed(chunks)

    def _solve_mixed(self, chunks: int) -> Solution | None:
        """Interleaved layers of several layouts; None where one alone is worth it, or nothing beats ``at_most``.

        What borders cost makes chains many times as many, and is seldom what decides: first it is left out, and where
        that leaves a ``GOOD`` gap and labels would have to be merged, it stays so.
        """
        layouts = self._worth_passing()
        if len(layouts) < 2:
            return None
        for effort in (FEW_EFFORT, self.effort) if self.effort.bounds else (self.effort,):
            self.bound_s, self.merged = math.inf, False
            free = self._solve_with(Borders(np.array([ANY]), chunks), effort)
            if not self.merged or self._is_good(self.bound_s):
                break
        if free is None or self.bound_s * ROUNDING >= self.at_most:
            return None
        passing = Borders(layouts, chunks)
        if len(passing) > MOST:
            self.merged = True
            return free
        below_s, self.bound_s, self.merged = self.bound_s, math.inf, False
        try:
            exact = self._solve_with(passing, replace(effort, whole=True) if self._is_good(below_s) else self.effort)
        except TooManyLabels:
            exact, self.bound_s, self.merged = None, below_s, True
        self.bound_s = max(self.bound_s, below_s)
        return min((s for s in (exact, free) if s is not None), key=lambda s: s.value)

    def _solve_with(self, borders: Borders, effort: Effort) -> Solution | None:
        # chains that pay for borders may take more than others
        widest = {first: np.max([self.allowed_s[at] for at in alike], axis=0) for first, alike in self._alike.items()}
        self.most_s = [widest[first] for first in self._first]
        bounds: list[Tables] = []
        grown: list[Found] = []
        exits: list[Ints] = []
        entries = borders.first
        for stage in range(len(self.bounds)):
            found = self._stage(stage, entries, borders, effort)
            table = self._table(stage, found, "bound_s")
            reached = [np.isfinite(work).any(axis=(0, 1)) for work in table.values()]
            exits.append(np.flatnonzero(np.any(reached, axis=0)) if reached else np.zeros(0, dtype=np.int64))
            if not len(exits[-1]):
                return None
            bounds.append({k: work[..., exits[-1]] for k, work in table.items()})
            grown.append(found)
            entries = borders.passed(exits[-1])
        bound = division = self._divided(bounds, borders, exits[-1])
        if bound is None:
            return None
        self.bound_s = min(self.bound_s, bound.value)
        if self.merged:
            tables = [self._table(stage, found, "work_s") for stage, found in enumerate(grown)]
            works = [{k: work[..., at] for k, work in table.items()} for table, at in zip(tables, exits, strict=True)]
            division = self._divided(works, borders, exits[-1])
        if division is None:
            return None
        solution = self._solution(division, grown, exits)
        if not borders.are_free:
            return solution
        return replace(solution, value=objective_s(solution.plan(self.space), self.space.setting))

    def _is_good(self, bound_s: float) -> bool:
        return self.effort.bounds and bound_s >= self.at_most * (1 - GOOD)

    def _worth_passing(self) -> Ints:
        """Layouts of the options of layers that may be part of a plan of value ``at_most`` by the dual bound."""
        return np.unique(np.concatenate([self._chains_of(stage).layouts for stage in range(len(self.bounds))]))

    def _chains_of(self, stage: int) -> StageChains:
        return StageChains(self.space, stage, self._of_any[self._first[stage]], self.most_s[stage])

    def _divided(self, tables: list[Tables], borders: Borders, last: Ints) -> Division | None:
        """The best division, for every way in which hidden states may come back from the last stage to the first."""
        if borders.chunks == 1:
            return divide(tables, self.geometry.num_layers, self.space.setting)
        best: Division | None = None
        first, *between, end = tables
        for at, entry in enumerate(borders.first):
            meeting, own = borders.meeting(entry, last), {k: work[:, at : at + 1] for k, work in first.items()}
            if not len(meeting) or not any(np.isfinite(work).any() for work in own.values()):
                continue
            closing = {k: work[..., meeting] for k, work in end.items()}
            found = divide([own, *between, closing], self.geometry.num_layers, self.space.setting)
            if found is not None and (best is None or found.value < best.value):
                segments = list(found.segments)
                segments[0] = (*segments[0][:2], at, segments[0][3])
                segments[-1] = (*segments[-1][:3], int(meeting[segments[-1][3]]))
                best = replace(found, segments=tuple(segments))
        return best

    def _stage(self, stage: int, entries: Ints, borders: Borders, effort: Effort) -> Found:
        """By (row, k) the chains of the segments of one stage, and of those that are alike.

        Parts with other ends have the stages between them too: what was found where no less was allowed is found here.
        """
        kept, most_s = self.bounds[self._first[stage]].kept, self.most_s[stage]
        asked = effort, borders.key, entries.tobytes()
        found: Found
        if kept and kept[0] == asked and (kept[1] >= most_s).all():
            found, merged = kept[2:]
        else:
            found, merged = self._chains(stage, entries, borders, effort)
            if 0 < stage < len(self.bounds) - 1:
                kept[:] = asked, most_s, found, merged
        self.merged |= merged
        return found

    def _chains(self, stage: int, entries: Ints, borders: Borders, effort: Effort) -> tuple[Found, bool]:
        """Those of every level of the largest transient one, and whether some were merged."""
        found: Found = {}
        merged, self.most_s[stage] = False, self.most_s[stage].copy()  # which what is found tightens
        chains = self._chains_of(stage)
        for level in np.argsort(chains.bound.level_s.min(axis=(1, 2)), kind="stable").tolist():
            for members in chains.alike(level):
                self.patience.check()
                chain = chains.chain(level, members, entries, borders, effort)
                if chain is not None:
                    result = grow(chain)
                    merged |= result.merged
                    for row, k in members:
                        if k in result.work_s:
                            found.setdefault((row, k), []).append(result)
                            self._tighten(stage, row, k, result.work_s[k])
        return found, merged

    def _tighten(self, stage: int, row: int, k: int, work_s: Floats) -> None:
        """Where layouts make no difference what was found is the most that others may take, and to a little effort."""
        if len(self.bounds) == 1 or work_s.size == 1 or not self.effort.bounds:
            found = float(work_s.min() + self.bounds[stage].shape.received_s[row, k]) * ROUNDING
            self.most_s[stage][row, k] = min(self.most_s[stage][row, k], found)

    def _table(self, stage: int, found: Found, of: Literal["work_s", "bound_s"]) -> Tables:
        """The table of one stage from its chains: the best that were found, or what none is below."""
        shape = self.bounds[stage].shape
        table: Tables = {}
        for (row, k), results in found.items():
            least = np.min([getattr(result, of)[k] for result in results], axis=0)
            at = table.setdefault(k, np.full((shape.allowed.shape[0], *least.shape), np.inf))
            at[row] = least + shape.received_s[row, k]
        return table

    def _solution(self, division: Division, grown: list[Found], exits: list[Ints]) -> Solution:
        pp, chunks = self.space.task.pp, self.space.task.model_chunks
        ends: dict[UnitName, LayerStrategy] = {}
        entries: list[list[LayerStrategy]] = [[] for _ in range(pp * chunks)]
        for stage, (start, k, entry, last) in enumerate(division.segments):
            results, classes = grown[stage][self.geometry.row(start), k], self.bounds[stage].shape.classes
            code = int(exits[stage][last])
            result = results[int(np.argmin([result.work_s[k][entry, code] for result in results]))]
            layers = []
            for at, option in result.options(k, entry, code):
                strategy = result.chain.classes[at].options.strategies[option]
                if classes[at].unit in ENDS:
                    ends[classes[at].unit] = strategy
                else:
                    layers.append(strategy)
            kinds = [kind for kind, _ in self.geometry.layers_of(stage, self.geometry.row(start), k)]
            for chunk, size in enumerate(self.geometry.chunk_sizes(k)):
                entries[chunk * pp + stage] = grouped(layers[:size], kinds[:size])
                layers, kinds = layers[size:], kinds[size:]
        return Solution(
            division.value,
            tuple(map(len, entries)),
            ends["embedding"],
            tuple(itertools.chain(*entries)),
            ends["head"],
        )
