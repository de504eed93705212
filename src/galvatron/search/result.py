"""What a search gives back: the plan, its rivals and what the explanation needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from galvatron.core.model import Origin
from galvatron.plan.plan import Plan, Prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How much of the space was looked at: tasks are (batch, pp, microbatches, schedule, chunks) combinations.

    ``left``: not looked at when an interrupt came; ``strategies``: the most that one layer could choose from in any.
    """

    tasks: int
    solved: int
    bounded_away: int
    infeasible: int
    replayed: int
    strategies: int
    left: int = 0


Stop = Literal["interrupt", "time limit"]


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
    ``stopped``: what ended the search before its proof was complete, if anything; its gap says how far it came.
    ``origins``: where the numbers of the model and of the hardware come from.
    """

    plan: Plan
    candidates: tuple[Plan, ...]
    baselines: dict[str, Plan | None]
    shortfalls: dict[str, Shortfall]
    unlimited: Plan | None
    memory_limit_bytes: int
    counts: Counts
    cpu_s: float
    stopped: Stop | None = None
    origins: tuple[Origin, Origin] = ("measured", "measured")

    @property
    def prediction(self) -> Prediction:
        """The chosen plan's."""
        return predicted(self.plan)


def predicted(plan: Plan) -> Prediction:
    """The prediction that every plan of a SearchResult carries."""
    assert plan.prediction is not None
    return plan.prediction


def seconds_per_sample(plan: Plan) -> float:
    """What plans of different batches are compared by."""
    return predicted(plan).step_time_s / plan.global_batch_size
