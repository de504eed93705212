"""One task solved: bounds, then stage tables from chains of options, then the division among stages.

Takes a costed Space; gives the fastest assignment that fits.  A guess just above the lower bound tells which segments,
options and chains cannot be part of anything better; what is left is solved exactly.  If nothing lies below the guess,
it was too low and is raised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache

import numpy as np

from galvatron.core.model import ENDS, UnitName
from galvatron.cost.strategies import Ints

from .ascending import Ascending
from .bounds import Bounds, StageBound, bound_of, least_works_s, relaxed_division
from .layers import FULL_EFFORT, GREAT_EFFORT, LITTLE_EFFORT, WHOLE_EFFORT, Effort, TooManyLabels
from .pairs import ANY, floors_s, undominated_pairs
from .patience import ENDLESS, Patience
from .solution import Solution
from .space import Space
from .stages import Division
from .tables import GOOD, ROUNDING, TaskSolver
from .unbeaten import without_beaten

UNLIMITED = 2**62
GUESSES = (2e-3, 8e-3, 1.6e-2, 4e-2, 1e-1, 1.0, math.inf)
"""By how much the optimum may exceed its bound before more of the space is let in: labels multiply with it."""

COARSE_GUESSES, NEAR_GUESSES = GUESSES[2:], GUESSES[1:4]
LONG = 64  # layers a stage
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
    whole = without_beaten(space)
    solved = _solve_parts(list(parts(whole, at_most)), at_most, effort, patience)
    if whole.task.model_chunks > 1 and len(whole.layer_layouts) > 1:
        worth = at_most if solved.solution is None else min(at_most, solved.solution.value * (1 - patience.gap))
        mixed = Solved(None, 0.0)
        if effort.bounds:
            mixed = _solve_parts(list(mixed_parts(whole, worth)), worth, effort, patience)
        lower = min(solved.lower_bound_s, mixed.lower_bound_s)
        solved = Solved(_better(solved.solution, mixed.solution), lower)
    best = solved.solution
    if best is not None and space.end_pairs is not None:
        best = replace(best, head=best.embedding)
    return Solved(best, solved.lower_bound_s if best is None else min(solved.lower_bound_s, best.value))


def _solve_parts(found: Sequence[Part], at_most: float, effort: Effort, patience: Patience) -> Solved:
    """The best plan of some parts, those of the lowest bounds first."""
    best: Solution | None = None
    lower = math.inf

    @lru_cache(maxsize=4)
    def bounded(i: int) -> tuple[Space, list[StageBound], Division | None]:
        part = found[i].space
        own = found[i].bounds.of(part)
        return part, own, relaxed_division(part, own)

    def relaxed_s(i: int) -> float:
        patience.check()
        relaxed = bounded(i)[2]
        return math.inf if relaxed is None else relaxed.value * (1 - 1e-12) + found[i].moves_s

    @cache
    def together_s(alike: Part) -> float:
        relaxed = relaxed_division(alike.space, own := alike.bounds.of(alike.space))
        if relaxed is None:
            return math.inf
        if worth > relaxed.value * (1 + GUESSES[1]):
            return alike.floor_s
        solver = TaskSolver(alike.space, own, worth, effort, patience)
        solver.solve()
        return min(solver.bound_s, worth * ROUNDING)

    def alike_s(i: int) -> float:
        alike = found[i].alike
        return 0.0 if alike is None or not effort.bounds else together_s(alike)

    order, worth = Ascending([part.floor_s for part in found], (relaxed_s, alike_s)), at_most
    while (i := order.first(worth)) is not None:
        order.drop()
        part, own, relaxed = bounded(i)
        assert relaxed is not None
        solved = _solve_within(part, own, relaxed, worth, effort, patience)
        lower = min(lower, solved.lower_bound_s)
        if solved.solution is not None and (best is None or solved.solution.value < best.value):
            best = solved.solution
            worth = min(worth, best.value * (1 if effort.bounds else 1 - NEAR))
    return Solved(best, min(lower, order.least))


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a space in which any options go together: ``group``, or what is ``chosen`` of it.

    ``floor_s``: what none of its plans is below; ``bounds``: for it, and shared with others of the group; ``moves_s``:
    what all of its plans take beyond the bounds, for a change of layout; ``alike``: it and others of that floor as one.
    """

    floor_s: float
    group: Space
    bounds: Bounds
    chosen: Mapping[UnitName, Ints] = field(default_factory=dict)
    moves_s: float = 0.0
    alike: Part | None = None

    @property
    def space(self) -> Space:
        """Of the part alone."""
        return self.group.restricted(self.chosen) if self.chosen else self.group


def parts(space: Space, at_most: float = math.inf) -> Iterator[Part]:
    """Parts that are ``space`` together; what has no plan of value ``at_most`` anyway stays together.

    Tied ends have equal strategies: every pair is a part, or, on one stage, all pairs of a layout, whose bytes and
    seconds add up.  Interleaved layers are all in one layout here: there are few ways then for chunks to meet.
    """
    for alternative in space.alternatives:
        if alternative.end_pairs is not None and space.task.pp == 1:
            yield from (Part(0.0, joined, Bounds(joined)) for joined in _joined(alternative))
        elif alternative.is_joined:
            yield from _parts(alternative, at_most)
        elif alternative.task.model_chunks > 1:
            groups = map(alternative.in_layout, range(len(space.layouts)))
            yield from (part for group in groups if not group.is_empty for part in _parts(group, at_most))
        else:
            yield from _parts(alternative, at_most)


def mixed_parts(space: Space, at_most: float) -> Iterator[Part]:
    """Parts that have all interleaved plans of several layouts: one change among the layers all of these pay for."""
    setting = space.setting
    m, fraction = setting.num_microbatches, setting.hardware.device.full_speed_fraction
    moves_s = space.least_move_s * min(fraction * setting.fill, m / setting.pp)  # by ``Setting.combined_s``
    for part in _parts(space, at_most):
        yield replace(part, floor_s=part.floor_s + moves_s, moves_s=moves_s)


def _joined(space: Space) -> list[Space]:
    """By layout of the ends, where one stage holds both."""
    layout, pairs = space.options["embedding"].layout, undominated_pairs(space)
    layouts = sorted({int(layout[i]) for i, _ in pairs})
    return [space.with_joined_ends([pair for pair in pairs if layout[pair[0]] == at]) for at in layouts]


def _parts(group: Space, at_most: float) -> Iterator[Part]:
    """Where ends are alike, or stages that join stacks have parts of the embedding, one for every pair of ends."""
    bounds, tied = Bounds(group), group.end_pairs is not None
    if not (tied or group.is_joined):
        yield Part(0.0, group, bounds)
        return
    least = least_works_s(group.with_free_ends() if tied and not group.is_joined else group, bounds)
    floor = math.inf if least is None else bound_of(group.setting, *least)
    if floor > at_most:
        yield Part(floor, group, bounds)
        return
    pairs = np.array(undominated_pairs(group), dtype=np.int64).reshape(-1, 2)
    floors = floors_s(group, bounds, pairs)
    for floor_s in np.unique(floors).tolist():
        members = pairs[floors == floor_s]
        alike = _of_pairs(floor_s, group, bounds, members)
        for i in range(len(members)):
            part = _of_pairs(floor_s, group, bounds, members[i : i + 1])
            yield part if len(members) == 1 else replace(part, alike=alike)


def _of_pairs(floor_s: float, group: Space, bounds: Bounds, pairs: Ints) -> Part:
    """The part that has the ends of some pairs."""
    chosen = {end: own for end, own in zip(ENDS, pairs.T, strict=True) if ANY not in own}
    return Part(floor_s, group, bounds, chosen)


def _solve_within(
    space: Space, bounds: list[StageBound], relaxed: Division, at_most: float, effort: Effort, patience: Patience
) -> Solved:
    """The same for one part: guesses rise from its bound until one is not too low."""
    lower = relaxed.value * (1 - 1e-12)
    if effort.bounds and space.geometry.num_layers > LONG * space.task.pp:
        solved = _solve_long(space, bounds, relaxed.value, at_most, patience)
        if solved is not None:
            return solved
    best: Solution | None = None
    is_mixed = effort.bounds and space.task.model_chunks > 1 and len(space.layer_layouts) > 1
    guesses = GUESSES if effort.bounds else COARSE_GUESSES
    for stretch in guesses if at_most > relaxed.value * (1 + GUESSES[1]) else (math.inf,):
        guess = min(relaxed.value * (1 + stretch), at_most, math.inf if best is None else best.value)
        solver = TaskSolver(space, bounds, guess, effort, patience)
        best = _better(best, solver.solve())
        lower = max(lower, min(solver.bound_s, guess))
        if best is not None and best.value <= lower * ROUNDING:
            return Solved(best, best.value)
        if best is not None and best.value * (1 - patience.gap) <= lower:
            return Solved(best, lower)
        if is_mixed and solver.merged and lower >= at_most * (1 - GOOD):
            break
        if effort.bounds and solver.merged and solver.bound_s < math.inf:
            best = _better(best, TaskSolver(space, bounds, guess, LITTLE_EFFORT, patience).solve())
        if guess == at_most or (solver.merged and best is not None):
            break
        if effort.bounds and best is None and stretch == GUESSES[0]:
            # a plan that is near the best lets less in than the next guesses
            best = _solve_near(space, bounds, relaxed.value, at_most, patience)
    if best is None or best.value > at_most * ROUNDING:
        return Solved(None, lower)
    return _retried(space, bounds, best, lower, patience) if effort.bounds else Solved(best, lower)


def _solve_long(
    space: Space, bounds: list[StageBound], relaxed_s: float, at_most: float, patience: Patience
) -> Solved | None:
    """Long chains, whose labels are the most: None where what a little effort comes to cannot be shown to be ``GOOD``.

    It is where no plan is better by more than that; it is taken as it is where labels would have to be merged to prove
    more, which takes long and seldom does.
    """
    best, lower = _solve_near(space, bounds, relaxed_s, at_most, patience), relaxed_s * (1 - 1e-12)
    if best is None:
        return None
    try:
        if best.value > lower * (1 + GOOD):
            lower, whole = best.value / (1 + GOOD), replace(GREAT_EFFORT, whole=True)
            better = TaskSolver(space, bounds, lower, whole, patience).solve()
            if better is not None:
                return Solved(better, better.value)
    except TooManyLabels:
        return None
    try:
        best = _better(best, TaskSolver(space, bounds, best.value, WHOLE_EFFORT, patience).solve()) or best
    except TooManyLabels:
        return Solved(best, min(lower, best.value))
    return Solved(best, best.value)


def _solve_near(
    space: Space, bounds: list[StageBound], relaxed_s: float, at_most: float, patience: Patience
) -> Solution | None:
    """A plan that a little effort finds within the next few guesses; None where it finds none."""
    for stretch in NEAR_GUESSES:
        guess = min(relaxed_s * (1 + stretch), at_most)
        found = TaskSolver(space, bounds, guess, LITTLE_EFFORT, patience).solve()
        if found is not None or guess == at_most:
            return found
    return None


def _better(a: Solution | None, b: Solution | None) -> Solution | None:
    return min((s for s in (a, b) if s is not None), key=lambda s: s.value, default=None)


def _retried(space: Space, bounds: list[StageBound], best: Solution, lower: float, patience: Patience) -> Solved:
    """Where labels had to be merged: again with more of them, without what cannot beat the plan found."""
    if best.value > lower * (1 + max(PROVEN, patience.gap)):
        solver, guess = TaskSolver(space, bounds, best.value, GREAT_EFFORT, patience), best.value
        best = _better(best, solver.solve()) or best
        lower = max(lower, min(solver.bound_s, guess))
    return Solved(best, min(lower, best.value))
