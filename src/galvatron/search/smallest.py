"""The plan of least peak memory, with or without room for it: what to show when nothing fits.

Takes a Space; ignores its limit and all times.  A stage with counts n of its classes peaks at

    min over R of  Σ n · (least held of options whose transient is at most R)  +  R  +  what it holds beside,

and the best division is the one whose largest peak is least.
"""

from __future__ import annotations

import numpy as np

from galvatron.core.model import ENDS
from galvatron.cost.strategies import Floats, Ints
from galvatron.plan.plan import LayerStrategy
from galvatron.plan.schedules import InFlight

from .geometry import StageShape
from .pairs import ANY, undominated_pairs
from .solution import Solution
from .space import Space
from .stages import Tables, largest_only

NEVER = 2**50  # bytes that no option holds
MAX_PAIRS = 16  # tied ends tried: those that hold least


def smallest(space: Space) -> Solution | None:
    """The plan of least peak memory; its value is the fullest stage's tensor bytes.  None: the space is empty."""
    found = [solution for solution in map(_of_any_options, space.alternatives) if solution is not None]
    return min(found, key=lambda solution: solution.value, default=None)


def _of_any_options(space: Space) -> Solution | None:
    if space.end_pairs is None and not space.is_joined:
        return _smallest(space)
    pairs = undominated_pairs(space)
    if not space.is_joined:
        pairs = sorted(pairs, key=lambda pair: _pair_bytes(space, pair))[:MAX_PAIRS]
    chosen = [{end: np.array([at]) for end, at in zip(ENDS, pair, strict=True) if at != ANY} for pair in pairs]
    found = [_smallest(space.restricted(own)) for own in chosen]
    return min((s for s in found if s is not None), key=lambda s: s.value, default=None)


def _pair_bytes(space: Space, pair: tuple[int, int]) -> int:
    ends = zip((space.options["embedding"], space.options["head"]), pair, strict=True)
    return max(int(o.held_bytes(InFlight(1))[i] + o.transient_bytes[i]) for o, i in ends)


def _smallest(space: Space) -> Solution | None:
    geometry = space.geometry
    peaks = [_Peaks(space, shape) for shape in geometry.stages]
    tables: list[Tables] = []
    for peak in peaks:
        usable = np.flatnonzero(peak.shape.allowed.any(axis=0)).tolist()
        tables.append({k: peak.bytes[:, k, None, None] for k in usable})
    division = largest_only(tables, geometry.num_layers)
    if division is None:
        return None
    ends: dict[str, LayerStrategy] = {}
    entries: list[list[LayerStrategy]] = [[] for _ in range(space.task.pp * space.task.model_chunks)]
    for stage, (start, k, _, _) in enumerate(division.segments):
        chosen = peaks[stage].strategies(geometry.row(start), k)
        for at, unit in enumerate(geometry.stages[stage].classes):
            if unit.unit in ENDS:
                ends[unit.unit] = chosen[at]
        layers = [
            chosen[geometry.class_of(stage, *layer)] for layer in geometry.layers_of(stage, geometry.row(start), k)
        ]
        for chunk, size in enumerate(geometry.chunk_sizes(k)):
            entries[chunk * space.task.pp + stage], layers = layers[:size], layers[size:]
    flat = tuple(strategy for entry in entries for strategy in entry)
    return Solution(division.value, tuple(map(len, entries)), ends["embedding"], flat, ends["head"])


class _Peaks:
    """The least peak of every segment of one stage, and which options have it."""

    def __init__(self, space: Space, shape: StageShape) -> None:
        self.space, self.shape = space, shape
        options = [space.options[unit.unit] for unit in shape.classes]
        held = [o.held_bytes(unit.in_flight) for o, unit in zip(options, shape.classes, strict=True)]
        transients = [o.transient_bytes for o in options]
        self.levels = np.unique(np.concatenate([_corners(h, t) for h, t in zip(held, transients, strict=True)]))
        self.least = np.array([_least(h, t, self.levels) for h, t in zip(held, transients, strict=True)])
        total = shape.counts @ self.least + self.levels + shape.beside_bytes[..., None]
        self.level = total.argmin(axis=-1)
        self.bytes: Floats = np.where(shape.allowed, total.min(axis=-1).astype(np.float64), np.inf)

    def strategies(self, row: int, k: int) -> list[LayerStrategy]:
        """The strategy of every class in the segment of least peak."""
        level = self.levels[self.level[row, k]]
        chosen = []
        for unit in self.shape.classes:
            options = self.space.options[unit.unit]
            held = np.where(
                options.transient_bytes <= level, options.held_bytes(unit.in_flight), np.iinfo(np.int64).max
            )
            chosen.append(options.strategies[int(held.argmin())])
        return chosen


def _corners(held: Ints, transient: Ints) -> Ints:
    """Transients at which the least held falls."""
    order = np.lexsort((held, transient))
    falls = np.concatenate(([True], held[order][1:] < np.minimum.accumulate(held[order])[:-1]))
    return transient[order][falls]


def _least(held: Ints, transient: Ints, levels: Ints) -> Ints:
    """For every level: the least held of options whose transient is at most that; ``NEVER`` where there is none."""
    order = np.argsort(transient, kind="stable")
    least = np.concatenate(([NEVER], np.minimum.accumulate(held[order])))
    found: Ints = least[np.searchsorted(transient[order], levels, side="right")]
    return found
