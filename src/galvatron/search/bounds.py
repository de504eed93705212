"""Lower bounds on a task's objective, cheap enough to compute for every task.

Takes a Space; gives, for every segment of every stage, seconds that its work cannot go below.  For
one segment with room B the relaxation is a Lagrangian dual: with a price λ ≥ 0 on bytes,

    Σ work  ≥  Σ_units min over options of (work + λ·held)  -  λ·B,

which leaves redistribution out.  Any λ bounds; the breakpoints of the options' lower hull make the bound exact for
fractional counts of options.  The largest transient comes off B: options are sorted into levels of transients, and the
bound is the least over levels q of what options up to q can do with B less the least transient of level q.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from galvatron.core.model import ENDS, UnitName
from galvatron.cost.setting import Setting
from galvatron.cost.strategies import Floats, Ints

from .geometry import StageShape, UnitClass
from .hulls import hull_slopes, prices_of
from .space import Options, Space
from .stages import BY_ENDS, Division, Tables, by_ends, divide, least_total_and_largest
from .unbeaten import NEVER, Staircase, distinct

ROUNDING = 1e-12  # relative; keeps float rounding from lifting a bound above the optimum that attains it
NUM_LEVELS = 16
FINE, FINER = 2e-3, 8  # on one stage levels whose bound is so near the least are divided, and into so many
NEVER_S = 1e15  # seconds of an option that does not exist


@dataclass(frozen=True)
class StageBound:
    """The dual of one stage, by levels of the largest transient.

    ``prices``: λ in seconds a byte.  Of the options up to level q, whose transients are at most ``largest[q]``:
    ``least_s[q, class, λ]``, the cheapest one's work + λ·held, and ``least_held[q, class]``.  ``least_transient[q]``:
    the least of level q itself.  ``level_s[q, row, k]``: the bound, with what is received, of plans whose largest
    transient is of level q; ``bound_s[row, k]``: of all.
    """

    shape: StageShape
    prices: Floats
    least_s: Floats
    least_held: Ints
    largest: Ints
    least_transient: Ints
    level_s: Floats
    bound_s: Floats
    kept: list[Any] = field(default_factory=list, compare=False)

    @cached_property
    def matrix(self) -> Floats:
        """``bound_s`` by [first layer, end]."""
        return by_ends(self.bound_s, self.bound_s.shape[1] - 1)


def first_alike(bounds: list[StageBound]) -> list[int]:
    """For every stage the first one whose segments are the same: of those between the ends, with as much in flight."""
    first: dict[tuple[UnitClass, ...], int] = {}
    between = range(1, len(bounds) - 1)
    return [first.setdefault(b.shape.classes, at) if at in between else at for at, b in enumerate(bounds)]


def of_any(bounds: list[StageBound]) -> StageBound:
    """The bound of the segments of any of some stages that are alike."""
    one, *others = bounds
    for other in others:
        new, had, has = other.shape.allowed & ~one.shape.allowed, one.shape, other.shape
        shape = replace(
            had,
            allowed=had.allowed | new,
            counts=np.where(new[..., None], has.counts, had.counts),
            received_s=np.where(new, has.received_s, had.received_s),
            beside_bytes=np.where(new, has.beside_bytes, had.beside_bytes),
        )
        levels, least = np.minimum(one.level_s, other.level_s), np.minimum(one.bound_s, other.bound_s)
        one = replace(one, shape=shape, level_s=levels, bound_s=least)
    return one


class Bounds:
    """The bounds of spaces that have the layers of one space and some of its ends.

    What layers alone say is computed once: where ends are tied, hundreds of pairs of them are bounded in turn.
    """

    def __init__(self, space: Space) -> None:
        self._space, self._edges = space, _level_edges(list(space.options.values()))
        kinds = (kind.name for kind in space.setting.model.spec.layers)
        self._layers = {kind: Staircase.of(space.options[kind], self._edges) for kind in kinds}
        self._slopes: dict[UnitClass, Floats] = {}
        self._between: dict[tuple[int, bytes], StageBound] = {}

    def of(self, part: Space) -> list[StageBound]:
        """Of every stage of ``part``."""
        own = self._layers | {end: Staircase.of(part.options[end], self._edges) for end in ENDS}
        found = [self._stage(stage, shape, own) for stage, shape in enumerate(part.geometry.stages)]
        return found if len(found) > 1 else [self._finely(part, found[0])]

    @property
    def between(self) -> list[StageBound]:
        """Of the stages without ends, of every space."""
        stages = self._space.geometry.stages
        return [self._stage(stage, stages[stage], self._layers) for stage in range(1, len(stages) - 1)]

    def _finely(self, part: Space, coarse: StageBound) -> StageBound:
        """The only stage's once more with finer levels where the bound is least: chains are longest there."""
        level_s, edges = coarse.level_s[:, 0, -1], self._edges
        near = np.flatnonzero(level_s <= level_s.min() * (1 + FINE))
        if not np.isfinite(level_s.min()):
            return coarse
        transients = distinct(np.concatenate([o.transient_bytes for o in part.options.values()]))
        level = np.searchsorted(edges, transients)
        finer = np.unique(np.concatenate([edges, *(_quantiles(transients[level == q], FINER) for q in near)]))
        own = {unit: Staircase.of(options, finer) for unit, options in part.options.items()}
        return self._bound(coarse.shape, own, finer)

    def with_each(self, shape: StageShape, end: Options) -> Floats:
        """[option, first layer, k]: the bound of a stage's segments with each of the options of its one end.

        What is received included.
        """
        inner = [at for at, unit in enumerate(shape.classes) if unit.unit not in ENDS]
        (place,) = set(range(len(shape.classes))) - set(inner)
        classes, edges = [shape.classes[at] for at in inner], self._edges
        own = [self._layers[unit.unit] for unit in classes]
        columns = [(o.options.work_s, o.options.held_bytes(c.in_flight)) for o, c in zip(own, classes, strict=True)]
        prices = prices_of([self._hull(unit, *column) for unit, column in zip(classes, columns, strict=True)])
        least_s, least_held, transient = _leasts(own, columns, prices, edges)
        segments = np.nonzero(shape.allowed)
        counts, room = shape.counts[segments][:, inner].T, self._space.usable_bytes - shape.beside_bytes[segments]
        rest_s = least_s.transpose(0, 2, 1) @ counts.astype(np.float64) - prices[:, None] * room
        rest = least_held @ counts
        level, held = np.searchsorted(edges, end.transient_bytes), end.held_bytes(shape.classes[place].in_flight)
        least = np.full((len(end), len(room)), np.inf)
        for q in range(len(edges)):
            passing = np.where(level == q, np.minimum(end.transient_bytes, transient[q]), transient[q])
            at = np.flatnonzero((level <= q) & (passing < NEVER))
            taken = held[at] + passing[at]
            work_s = (rest_s[q] + (end.work_s[at, None] + np.outer(taken, prices))[:, :, None]).max(axis=1)
            fits = rest[q] + taken[:, None] <= room
            least[at] = np.minimum(least[at], np.where(fits, work_s, np.inf))
        least = np.where(least < np.inf, least * (1 - ROUNDING * np.sign(least)), np.inf) + shape.received_s[segments]
        bound = np.full((len(end), *shape.allowed.shape), np.inf)
        bound[:, shape.allowed] = least
        return bound

    def _stage(self, stage: int, shape: StageShape, staircases: dict[str, Staircase]) -> StageBound:
        if not 0 < stage < self._space.task.pp - 1:
            return self._bound(shape, staircases)
        key = stage, shape.beside_bytes.tobytes()  # what runs between stacks depends on the embedding
        if key not in self._between:
            self._between[key] = self._bound(shape, staircases)
        return self._between[key]

    def _bound(self, shape: StageShape, staircases: dict[str, Staircase], edges: Ints | None = None) -> StageBound:
        own = [staircases[c.unit] for c in shape.classes]
        columns = [
            (o.options.work_s, o.options.held_bytes(c.in_flight)) for o, c in zip(own, shape.classes, strict=True)
        ]
        hulls = [self._hull(unit, *column) for unit, column in zip(shape.classes, columns, strict=True)]
        levels = self._edges if edges is None else edges
        return _stage_bound(self._space.usable_bytes, shape, own, columns, prices_of(hulls), levels)

    def _hull(self, unit: UnitClass, work_s: Floats, held: Ints) -> Floats:
        if unit.unit in ENDS:
            return hull_slopes(work_s, held)
        if unit not in self._slopes:
            self._slopes[unit] = hull_slopes(work_s, held)
        return self._slopes[unit]


def stage_bounds(space: Space) -> list[StageBound]:
    """The bounds of every stage's segments; infinite where a segment surely does not fit."""
    return Bounds(space).of(space)


def _level_edges(options: list[Options]) -> Ints:
    """Transients, ascending, at which the bound distinguishes levels."""
    return _quantiles(distinct(np.concatenate([o.transient_bytes for o in options])))


def _quantiles(ascending: Ints, most: int = NUM_LEVELS) -> Ints:
    """``most`` of them, the largest among them."""
    at = np.linspace(0, len(ascending) - 1, min(most, len(ascending))).astype(int)
    edges: Ints = ascending[np.unique(at)]
    return edges


def _stage_bound(
    usable_bytes: int,
    shape: StageShape,
    own: list[Staircase],
    columns: list[tuple[Floats, Ints]],
    prices: Floats,
    edges: Ints,
) -> StageBound:
    """``own``, ``columns``: the options of every class, and their (work, held bytes); ``edges``: of the levels."""
    least_s, least_held, transient = _leasts(own, columns, prices, edges)
    segments = np.nonzero(shape.allowed)
    counts, room = shape.counts[segments].T, usable_bytes - shape.beside_bytes[segments] - transient[:, None]
    work_s = least_s.transpose(0, 2, 1) @ counts.astype(np.float64)  # [level, price, segment]
    work_s -= prices[:, None] * room[:, None]
    fits = (least_held @ counts <= room) & (transient < NEVER)[:, None]
    bound = np.full((len(edges), *shape.allowed.shape), np.inf)
    bound[:, shape.allowed] = np.where(fits, work_s.max(axis=1), np.inf)
    level_s = np.where(bound < np.inf, bound * (1 - ROUNDING * np.sign(bound)) + shape.received_s, np.inf)
    return StageBound(shape, prices, least_s, least_held, edges, transient, level_s, level_s.min(axis=0))


def _leasts(
    own: list[Staircase], columns: list[tuple[Floats, Ints]], prices: Floats, edges: Ints
) -> tuple[Floats, Ints, Ints]:
    """(least_s[level, class, λ], least_held[level, class], least_transient[level]) as in ``StageBound``.

    A plan whose largest transient is of level q has the options up to q and loses at least the least of level q.
    """
    levels = len(edges)
    least_s = np.full((levels, len(own), len(prices)), NEVER_S)
    least_held = np.full((levels, len(own)), NEVER, dtype=np.int64)
    for at, (staircase, (work, held)) in enumerate(zip(own, columns, strict=True)):
        staircase.lower(least_s[:, at], work[:, None] + np.outer(held, prices))
        staircase.lower(least_held[:, at], held)
    return least_s, least_held, np.min([staircase.least_transient for staircase in own], axis=0)


def relaxed_division(space: Space, bounds: list[StageBound]) -> Division | None:
    """The best division if every segment took its bound; its value bounds the task, None: nothing fits."""
    return divide(bound_tables(bounds), space.geometry.num_layers, space.setting)


def bound_tables(bounds: list[StageBound]) -> list[Tables]:
    """Every segment at its bound, whatever the layouts."""
    return [{BY_ENDS: bound.matrix[None]} for bound in bounds]


def lower_bounds_s(space: Space, *settings: Setting) -> list[float]:
    """Seconds that the task's objective cannot go below; infinite when it surely has no plan.

    Coarser than ``relaxed_division``: Σ and max at their least, each on its own.  ``settings``: the interleaved ones of
    a 1F1B task of equal layers, for each of which comes a bound too.  Interleaved stages hold no fewer activations,
    spread what comes once a step over fewer microbatches' worth of time and divide layers in fewer ways, so that their
    Σ and max are no less than those of 1F1B without what it receives.
    """
    if space.is_empty:
        return [math.inf] * (1 + len(settings))
    bounds = stage_bounds(space)
    found = [_least_s(space, space.setting, bound_tables(bounds))]
    if settings:
        without = [replace(bound, bound_s=bound.bound_s - bound.shape.received_s) for bound in bounds]
        tables = bound_tables(without)
        found += [_least_s(space, setting, tables) for setting in settings]
    return found


def least_works_s(space: Space, bounds: Bounds) -> tuple[float, float] | None:
    """What Σ and max of the stages' work cannot go below, each on its own; None: nothing fits."""
    return least_total_and_largest(bound_tables(bounds.of(space)), space.geometry.num_layers)


def bound_of(setting: Setting, total_s: float, largest_s: float) -> float:
    """Seconds that the objective cannot go below where Σ and max of the work cannot go below these."""
    return float(setting.combined_s(total_s, max(largest_s, total_s / setting.pp))) * (1 - ROUNDING)


def bounds_of(setting: Setting, total_s: Floats, largest_s: Floats) -> Floats:
    """The same of many; infinite where either is."""
    known = np.isfinite(total_s) & np.isfinite(largest_s)
    total, largest = total_s[known], largest_s[known]
    found = np.full(len(total_s), np.inf)
    found[known] = setting.combined_s(total, np.maximum(largest, total / setting.pp)) * (1 - ROUNDING)
    return found


def _least_s(space: Space, setting: Setting, tables: list[Tables]) -> float:
    least = least_total_and_largest(tables, space.geometry.num_layers)
    if least is None:
        return math.inf
    return bound_of(setting, *least)


def fastest_s(setting: Setting, least: Mapping[UnitName, float]) -> float:
    """Seconds that the objective cannot go below where no unit's work is less than ``least``; infinite where one is."""
    if math.inf in least.values():
        return math.inf
    layers = setting.model.spec.layers
    total = sum(kind.count * least[kind.name] for kind in layers) + least["embedding"] + least["head"]
    share = math.ceil(sum(kind.count for kind in layers) / setting.pp) * min(least[kind.name] for kind in layers)
    return bound_of(setting, total, share)
