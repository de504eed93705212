"""One task solved: bounds, then stage tables from chains of options, then the division among stages.

Takes a costed Space; gives the fastest assignment that fits.  A guess just above the lower bound tells which segments,
options and chains cannot be part of anything better; what is left is solved exactly.  If nothing lies below the guess,
it was too low and is raised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from galvatron.core.model import ENDS

from .bounds import Bounds, StageBound, bound_of, least_works_s, relaxed_division
from .layers import FULL_EFFORT, GREAT_EFFORT, LITTLE_EFFORT, Effort
from .patience import ENDLESS, Patience
from .space import Space
from .tables import ROUNDING, Solution, TaskSolver

UNLIMITED = 2**62
GUESSES = (2e-3, 8e-3, 1.6e-2, 4e-2, 1e-1, 1.0, math.inf)
"""By how much the optimum may exceed its bound before more of the space is let in: labels multiply with it."""

COARSE_GUESSES = GUESSES[2:]
PROVEN = 1e-4  # a gap that is not worth a search
NEAR = 1e-2  # what a further part must save where the best is not asked for


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
    for floor, part, bounds in parts(space):
        worth = at_most if effort.bounds or best is None else at_most * (1 - NEAR)
        if floor > worth:
            lower = min(lower, floor)
            break
        solved = _solve_within(part, bounds.of(part), worth, effort, patience)
        lower = min(lower, solved.lower_bound_s)
        if solved.solution is not None and (best is None or solved.solution.value < best.value):
            best, at_most = solved.solution, min(at_most, solved.solution.value)
    return Solved(best, lower if best is None else min(lower, best.value))


def parts(space: Space) -> Iterator[tuple[float, Space, Bounds]]:
    """Spaces that are ``space`` together, in each of which any options go together, with bounds for them.

    By ascending floor, which none of a part's plans is below.  Tied ends have equal strategies: every pair is a part.
    Interleaved layers are all in one layout, so that chunks meet without redistribution.
    """
    found = (part for alternative in space.alternatives for part in _parts(alternative))
    for floor, group, bounds, pair in sorted(found, key=lambda part: part[0]):
        ends = {end: np.array([at]) for end, at in zip(ENDS, pair, strict=False)}
        yield floor, group.restricted(ends), bounds


def _parts(space: Space) -> Iterator[tuple[float, Space, Bounds, tuple[int, ...]]]:
    """(floor, the space in one layout where it is interleaved, its bounds, a pair of tied ends)."""
    interleaved, pairs = space.task.model_chunks > 1, None if space.end_pairs is None else undominated_pairs(space)
    for group in map(space.in_layout, range(len(space.layouts))) if interleaved else [space]:
        if group.is_empty:
            continue
        bounds = Bounds(group)
        if pairs is None and not interleaved:
            yield 0.0, group, bounds, ()
            continue
        ends = [group.options[end].work_s for end in ENDS]
        least = least_works_s(group if pairs is None else group.with_free_ends(), bounds)
        for pair in [()] if pairs is None else pairs:
            if least is not None:
                total = least[0] + sum(float(work[at]) for work, at in zip(ends, pair, strict=False))
                yield bound_of(space.setting, total, least[1]), group, bounds, pair


def _solve_within(
    space: Space, bounds: list[StageBound], at_most: float, effort: Effort, patience: Patience
) -> Solved:
    """The same for one part: guesses rise from its bound until one is not too low."""
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
