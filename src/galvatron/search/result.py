"""What a search gives back: the plan, its rivals and what the explanation needs."""

from __future__ import annotations

from dataclasses import dataclass

from galvatron.plan.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How much of the space was looked at: tasks are (pp, microbatches, schedule) combinations."""

    tasks: int
    solved: int
    bounded_away: int
    infeasible: int
    replayed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortfall:
    """The plan of a family that comes nearest to fitting: ``stage`` needs ``bytes_short`` more than the limit."""

    plan: Plan
    stage: int
    bytes_short: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The chosen plan with its rivals, every one with its prediction.

    ``plan`` carries the proof.  ``candidates``: the runners-up, best of their own task, fastest first.
    ``baselines``: the best of each simple family, None where none fits (``shortfalls`` then says by how much) or
    none is possible.  ``unlimited``: the additive optimum without a memory limit, None when the limit costs nothing.
    """

    plan: Plan
    candidates: tuple[Plan, ...]
    baselines: dict[str, Plan | None]
    shortfalls: dict[str, Shortfall]
    unlimited: Plan | None
    memory_limit_bytes: int
    counts: Counts
    cpu_s: float
