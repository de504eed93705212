"""The stages of one task solved: tables from chains of options, then the division among stages.

Takes a Space with its bounds and the most that a plan may cost; gives the best plan of what that leaves.  Segments,
options and chains that cannot be part of such a plan are left out before they cost anything.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from galvatron.core.model import ENDS, UnitName
from galvatron.cost.strategies import Floats, Ints
from galvatron.plan.plan import LayerStrategy, Plan
from galvatron.plan.rules import beyond_runtime

from .bounds import StageBound
from .geometry import Geometry
from .layers import ANY, FULL_EFFORT, Chain, ClassOptions, Effort, Goal, Grown, grow, undominated_options
from .patience import ENDLESS, Patience
from .space import Options, Space
from .stages import Division, Join, Tables, divide

Found = dict[tuple[int, int], list[Grown]]
"""By (row, k) the chains of a segment."""

ROUNDING = 1 + 1e-9  # what a chain may cost is stretched by this much, so that rounding cuts off nothing


@dataclass(frozen=True)
class Solution:
    """``value``: the additive objective in seconds, or the fullest stage's tensor bytes when memory was the aim."""

    value: float
    layers_per_stage: tuple[int, ...]
    embedding: LayerStrategy
    layers: tuple[LayerStrategy, ...]
    head: LayerStrategy

    def plan(self, space: Space) -> Plan:
        """The solution as a plan, labelled with what the runtime cannot run yet."""
        setting, task = space.setting, space.task
        plan = Plan(
            model=setting.model.spec.name,
            world_size=setting.hardware.world_size,
            layers_per_stage=self.layers_per_stage,
            schedule=task.schedule,
            model_chunks=task.model_chunks,
            num_microbatches=task.num_microbatches,
            global_batch_size=setting.global_batch_size,
            seq_len=setting.seq_len,
            precision=setting.precision,
            grad_reduce_dtype=setting.grad_reduce_dtype,
            embedding=self.embedding,
            layers=self.layers,
            head=self.head,
        )
        return plan.model_copy(update={"what_if": tuple(beyond_runtime(plan))})


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
        self.merged, self.bound_s = False, math.inf
        self.most_s = _most_work_s(self.geometry, self.bounds, at_most * ROUNDING)

    def solve(self) -> Solution | None:
        """The best plan of what is left; None when there is none."""
        best = self._solve()
        if self.merged and not self.effort.bounds:
            self.bound_s = -math.inf
        return best

    def _solve(self) -> Solution | None:
        bounds: list[Tables] = []
        grown: list[Found] = []
        entries = np.array([ANY])
        for stage in range(len(self.bounds)):
            found = self._stage(stage, entries)
            table = self._table(stage, found, "bound_s")
            reached = [np.isfinite(work).any(axis=(0, 1)) for work in table.values()]
            entries = np.flatnonzero(np.any(reached, axis=0)) if reached else np.zeros(0, dtype=np.int64)
            if not len(entries):
                return None
            bounds.append(table)
            grown.append(found)
        bound = division = divide(bounds, self.geometry.num_layers, self.space.setting)
        if bound is None:
            return None
        self.bound_s = min(self.bound_s, bound.value)
        if self.merged:
            works = [self._table(stage, found, "work_s") for stage, found in enumerate(grown)]
            division = divide(works, self.geometry.num_layers, self.space.setting)
        return None if division is None else self._solution(division, grown)

    def _stage(self, stage: int, entries: Ints) -> Found:
        """By (row, k) the chains of one stage's segments, of every level of the largest transient one."""
        found: Found = {}
        for level in np.argsort(self.bounds[stage].level_s.min(axis=(1, 2)), kind="stable").tolist():
            for members in self._alike(stage, level):
                self.patience.check()
                chain = self._chain(stage, level, members, entries)
                if chain is not None:
                    result = grow(chain)
                    self.merged |= result.merged
                    for row, k in members:
                        if k in result.work_s:
                            found.setdefault((row, k), []).append(result)
                            self._tighten(row, k, float(result.work_s[k].min()))
        return found

    def _tighten(self, row: int, k: int, work_s: float) -> None:
        """On one stage what was found is the most that others may take."""
        if len(self.bounds) == 1:
            self.most_s[0][row, k] = min(self.most_s[0][row, k], work_s * ROUNDING)

    def _table(self, stage: int, found: Found, of: Literal["work_s", "bound_s"]) -> Tables:
        """The table of one stage from its chains: the best that were found, or what none is below."""
        shape, size = self.bounds[stage].shape, len(self.space.layouts)
        table: Tables = {}
        for (row, k), results in found.items():
            at = table.setdefault(k, np.full((shape.allowed.shape[0], size, size), np.inf))
            at[row] = np.min([getattr(result, of)[k] for result in results], axis=0) + shape.received_s[row, k]
        return table

    def _alike(self, stage: int, level: int) -> list[list[tuple[int, int]]]:
        """Segments (row, k) worth solving at a level, those together whose units are the first of one chain."""
        level_s = self.bounds[stage].level_s[level]
        worth = np.isfinite(level_s) & (level_s <= self.most_s[stage])
        groups: dict[tuple[object, ...], list[tuple[int, int]]] = {}
        for row in np.flatnonzero(worth.any(axis=1)).tolist():
            lengths = np.flatnonzero(worth[row]).tolist()
            for k in lengths:
                longest = k if self.geometry.interleaved else lengths[-1]
                layers = tuple(self.geometry.layers_of(stage, row, longest))
                after = self.geometry.kinds[row + longest : row + longest + 1] if self.geometry.rows > 1 else ()
                groups.setdefault((layers, *after), []).append((row, k))
        return list(groups.values())

    def _chain(self, stage: int, level: int, members: list[tuple[int, int]], entries: Ints) -> Chain | None:
        """The chain that serves all ``members`` (row, k): equal layers up to the longest.

        It has the options up to ``level``, of which what is below the level counts as its least.
        """
        shape = self.bounds[stage].shape
        row, longest = max(members, key=lambda member: member[1])
        layers = [self.geometry.class_of(stage, *layer) for layer in self.geometry.layers_of(stage, row, longest)]
        ends = {unit.unit: at for at, unit in enumerate(shape.classes) if unit.unit in ENDS}
        goals = self._goals(stage, level, members, layers, ends)
        used = sorted({*layers, *ends.values()})
        options = {at: self._options(stage, level, at, goals, ends) for at in used}
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
        prices, size = self.bounds[stage].prices, len(self.space.layouts)
        first, last = ends.get("embedding"), ends.get("head")
        return Chain(classes, first, layers, last, goals, entries, transients, prices, size, self.effort)

    @staticmethod
    def _least_transient(
        options: dict[int, Options], ends: dict[UnitName, int], goals: dict[int, Goal], layers: list[int]
    ) -> int:
        """A transient that every chain has anyway, by the units that all of them hold: smaller ones count as that."""
        always = {*ends.values(), *layers[: min(goals)]}
        return max(int(options[at].transient_bytes.min()) for at in always)

    def _goals(
        self, stage: int, level: int, members: list[tuple[int, int]], layers: list[int], ends: dict[UnitName, int]
    ) -> dict[int, Goal]:
        """What every number of layers among ``members`` may take, and what remains after each layer."""
        bound, goals = self.bounds[stage], {}
        for k in sorted({k for _, k in members}):
            rows = [row for row, length in members if length == k]
            units = [*layers[:k], *([ends["head"]] if "head" in ends else [])]
            least_s, least_held = (
                np.zeros((len(units) + 1, len(bound.prices))),
                np.zeros(len(units) + 1, dtype=np.int64),
            )
            for j in range(len(units) - 1, -1, -1):
                least_s[j] = least_s[j + 1] + bound.least_s[level, units[j]]
                least_held[j] = least_held[j + 1] + bound.least_held[level, units[j]]
            most_s = max(float(self.most_s[stage][row, k] - bound.shape.received_s[row, k]) for row in rows)
            goals[k] = Goal(
                self.space.usable_bytes - int(bound.shape.beside_bytes[rows[0], k]), most_s, least_s, least_held
            )
        return goals

    def _options(self, stage: int, level: int, at: int, goals: dict[int, Goal], ends: dict[UnitName, int]) -> Options:
        """The options of a class that may be part of some goal by the dual bound, and are not dominated."""
        bound, unit = self.bounds[stage], self.bounds[stage].shape.classes[at]
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

    def _solution(self, division: Division, grown: list[Found]) -> Solution:
        pp, chunks = self.space.task.pp, self.space.task.model_chunks
        ends: dict[UnitName, LayerStrategy] = {}
        entries: list[list[LayerStrategy]] = [[] for _ in range(pp * chunks)]
        for stage, (start, k, entry, last) in enumerate(division.segments):
            results, classes = grown[stage][self.geometry.row(start), k], self.bounds[stage].shape.classes
            result = results[int(np.argmin([result.work_s[k][entry, last] for result in results]))]
            layers = []
            for at, option in result.options(k, entry, last):
                strategy = result.chain.classes[at].options.strategies[option]
                if classes[at].unit in ENDS:
                    ends[classes[at].unit] = strategy
                else:
                    layers.append(strategy)
            kinds = [kind for kind, _ in self.geometry.layers_of(stage, self.geometry.row(start), k)]
            for chunk, size in enumerate(self.geometry.chunk_sizes(k)):
                entries[chunk * pp + stage] = _grouped(layers[:size], kinds[:size])
                layers, kinds = layers[size:], kinds[size:]
        return Solution(
            division.value,
            tuple(map(len, entries)),
            ends["embedding"],
            tuple(itertools.chain(*entries)),
            ends["head"],
        )


def _grouped(layers: list[LayerStrategy], kinds: list[UnitName]) -> list[LayerStrategy]:
    """The same with equal strategies side by side: among layers of one kind and layout their order costs nothing."""
    grouped: list[LayerStrategy] = []
    pairs = zip(layers, kinds, strict=True)
    for _, members in itertools.groupby(pairs, key=lambda pair: (pair[1], pair[0].sequence_degree)):
        run = [strategy for strategy, _ in members]
        grouped += sorted(run, key=run.index)
    return grouped


def _most_work_s(geometry: Geometry, bounds: list[StageBound], at_most: float) -> list[Floats]:
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
