"""One task solved: bounds, then stage tables from chains of options, then the division among stages.

Takes a costed Space; gives the fastest assignment that fits.  A guess just above the lower bound tells which segments,
options and chains cannot be part of anything better; what is left is solved exactly.  If nothing lies below the guess,
it was too low and is raised.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .bounds import StageBound, bound_of, least_works_s, relaxed_division, stage_bounds
from .layers import FULL_EFFORT, GREAT_EFFORT, LITTLE_EFFORT, Effort
from .patience import ENDLESS, Patience
from .space import Space
from .tables import ROUNDING, Solution, TaskSolver

UNLIMITED = 2**62
GUESSES = (2e-3, 8e-3, 1.6e-2, 4e-2, 1e-1, 1.0, math.inf)
"""By how much the optimum may exceed its bound before more of the space is let in: labels multiply with it."""

COARSE_GUESSES = GUESSES[2:]
PROVEN = 1e-4  # a gap that is not worth a search


@dataclass(frozen=True)
class Solved:
    """The best plan found, None where there is none, and what no plan of the space goes below.

    The two are equal where the solution is exact; infinite where surely nothing fits.
    """

    solution: Solution | None
    lower_bound_s: float


def solve(
    space: Space, at_most: float = math.inf, effort: Effort = FULL_EFFORT, patience: Patience = ENDLESS
) -> Solved:
    """The best plan of ``space`` whose value is at most ``at_most``; the bound is cut off there too.

    With less than full effort, or within a gap, the plan may be a little off the best; the bound stays true.

    Raises:
        TimeUp: ``patience`` came to its end.
    """
    best: Solution | None = None
    lower = math.inf
    for floor, part in parts(space):
        if floor > at_most:
            lower = min(lower, floor)
            break
        solved = _solve_within(part, at_most, effort, patience)
        lower = min(lower, solved.lower_bound_s)
        if solved.solution is not None and (best is None or solved.solution.value < best.value):
            best, at_most = solved.solution, min(at_most, solved.solution.value)
    return Solved(best, lower if best is None else min(lower, best.value))


def parts(space: Space) -> Iterator[tuple[float, Space]]:
    """Spaces that are ``space`` together, in each of which any options go together; what none of their plans is below.

    Tied ends have equal strategies: every pair is a part.  Interleaved layers are all in one layout, so that chunks
    meet without redistribution.
    """
    found = [[(0.0, part)] if part.end_pairs is None else _pairs(part) for part in space.alternatives]
    pairs = heapq.merge(*found, key=lambda pair: pair[0])
    for floor, pair in pairs:
        layouts = range(len(space.layouts)) if space.task.model_chunks > 1 else ()
        for part in [pair.in_layout(layout) for layout in layouts] or [pair]:
            if not part.is_empty:
                yield floor, part


def _pairs(space: Space) -> list[tuple[float, Space]]:
    """Every pair of tied ends, by what they add to layers that have all the room."""
    layers = least_works_s(space.with_free_ends())
    if layers is None:
        return []
    found = []
    for i, j in undominated_pairs(space):
        total = layers[0] + float(space.options["embedding"].work_s[i] + space.options["head"].work_s[j])
        found.append(
            (
                bound_of(space.setting, total, layers[1]),
                space.restricted({"embedding": np.array([i]), "head": np.array([j])}),
            )
        )
    return sorted(found, key=lambda pair: pair[0])


def _solve_within(space: Space, at_most: float, effort: Effort, patience: Patience) -> Solved:
    """The same for one part: guesses rise from its bound until one is not too low."""
    bounds = stage_bounds(space)
    relaxed = relaxed_division(space, bounds)
    if relaxed is None:
        return Solved(None, math.inf)
    lower = relaxed.value * (1 - 1e-12)
    if lower > at_most:
        return Solved(None, lower)
    best: Solution | None = None
    for stretch in GUESSES if effort.bounds else COARSE_GUESSES:
        guess = min(relaxed.value * (1 + stretch), at_most, math.inf if best is None else best.value)
        solver = TaskSolver(space, bounds, guess, effort, patience)
        best = _better(best, solver.solve())
        lower = max(lower, min(solver.bound_s, guess))
        if best is not None and best.value <= lower * ROUNDING:
            return Solved(best, best.value)
        if best is not None and best.value * (1 - patience.gap) <= lower:
            return Solved(best, lower)
        if solver.merged and effort.bounds and solver.bound_s < math.inf:
            best = _better(best, TaskSolver(space, bounds, guess, LITTLE_EFFORT, patience).solve())
        if guess == at_most or (solver.merged and best is not None):
            break
    if best is None or best.value > at_most * ROUNDING:
        return Solved(None, lower)
    return _retried(space, bounds, best, lower, patience) if effort.bounds else Solved(best, lower)


def _better(a: Solution | None, b: Solution | None) -> Solution | None:
    return min((s for s in (a, b) if s is not None), key=lambda s: s.value, default=None)


def _retried(space: Space, bounds: list[StageBound], best: Solution, lower: float, patience: Patience) -> Solved:
    """Where labels had to be merged: again with more of them, without what cannot beat the plan found."""
    if best.value > lower * (1 + max(PROVEN, patience.gap)):
        solver, guess = TaskSolver(space, bounds, best.value, GREAT_EFFORT, patience), best.value
        best = _better(best, solver.solve()) or best
        lower = max(lower, min(solver.bound_s, guess))
    return Solved(best, min(lower, best.value))


def undominated_pairs(space: Space) -> list[tuple[int, int]]:
    """Pairs that no other of the same layout equals or beats in work and bytes of both ends."""
    assert space.end_pairs is not None
    pairs = np.array(space.end_pairs)
    embedding, head = space.options["embedding"].take(pairs[:, 0]), space.options["head"].take(pairs[:, 1])
    columns = [
        column
        for o in (embedding, head)
        for column in (o.work_s, o.resident_bytes, o.activation_bytes, o.transient_bytes)
    ]
    table = np.array([*columns, embedding.layout], dtype=np.float64).T
    kept: list[int] = []
    for at in np.lexsort((*table.T[:0:-1], table[:, 0] + table[:, 4])):
        rivals = table[kept]
        same = rivals[:, 8] == table[at, 8] if len(kept) else np.zeros(0, dtype=bool)
        if not (same & (rivals[:, :8] <= table[at, :8]).all(axis=1)).any():
            kept.append(int(at))
    return [(int(pairs[at, 0]), int(pairs[at, 1])) for at in kept]
