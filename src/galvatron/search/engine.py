"""The search: every task bounded, the promising ones solved, the best replayed.

Takes two profiles and a batch; gives a SearchResult.  Deterministic: equal input gives an equal plan.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from galvatron.core.hardware import HardwareProfile
from galvatron.core.model import Precision, ReduceDtype
from galvatron.core.model_profile import ModelProfile
from galvatron.cost.setting import Setting
from galvatron.plan.plan import Plan, Proof

from .baselines import FAMILIES
from .checks import check_question
from .job import Job, Progress, describe, score
from .layers import FULL_EFFORT, LITTLE_EFFORT
from .limits import Limits
from .patience import Patience, TimeUp
from .result import Counts, SearchResult, Shortfall, Stop, predicted, seconds_per_sample
from .rivals import best_of_family, infeasible, shortfall_of_family, unlimited
from .solution import Solution
from .solve import Solved, solve
from .space import Space
from .twins import stage_layers, twins

NUM_CANDIDATES, FEWEST_CANDIDATES = 8, 3
RUNNER_UP = 0.1
"""How far behind the best a plan may be to be looked for, once there are a few to show and to resume under: the replay
tells plans apart by a few percent."""

_STOPS: dict[type[BaseException], Stop] = {KeyboardInterrupt: "interrupt", TimeUp: "time limit"}


def search(
    model_profile: ModelProfile,
    hardware_profile: HardwareProfile,
    *,
    global_batch_size: int | Sequence[int],
    seq_len: int | None = None,
    memory_limit_bytes: int | None = None,
    precision: Precision | None = None,
    grad_reduce_dtype: ReduceDtype = "fp32",
    limits: Limits | None = None,
    num_candidates: int = NUM_CANDIDATES,
    baselines: bool = True,
    gap: float = 0.0,
    time_limit_s: float | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Find the fastest plan that fits.

    Exact for the additive objective over the whole space; the ``num_candidates`` best tasks' plans are replayed, each
    under other schedules of the same chunks too, and the fastest replay is chosen.  An interrupt (KeyboardInterrupt) or
    the time limit ends the search with the best plan so far, or with the first that is found quickly where there is
    none yet.

    Args:
        model_profile: measured at ``seq_len`` and ``precision``, which default to the profile's own.
        hardware_profile: of the world to plan for.
        global_batch_size: sequences of one step; of several the one with the best throughput is chosen.
        seq_len: tokens of one sequence.
        memory_limit_bytes: per device; defaults to the device's memory.
        precision: compute dtype.
        grad_reduce_dtype: dtype in which gradients are reduced.
        limits: the space, and what is fixed, forbidden or bounded in it.
        num_candidates: plans to replay.
        baselines: whether to search the simple plans too, and what memory costs.
        gap: how much slower than proven possible the plan may be, a fraction; a search stops when its answer is
            proved within it, and replays what it has by then.
        time_limit_s: seconds of wall time after which it stops with what it has.
        progress: called with one line of text a task.

    Raises:
        ConfigError: limits contradict each other; a fixed dimension does not divide the world or the batch, or exceeds
            the layers; a batch is beyond what bytes can count.
        ProfileError: a profile lacks a measurement, or the two are of different devices.
        InfeasibleError: no plan fits the memory limit, or none divides the batch.
    """
    start, patience, limits = time.process_time(), Patience.of(gap, time_limit_s), limits or Limits()
    batches = [global_batch_size] if isinstance(global_batch_size, int) else sorted(set(global_batch_size))
    check_question(model_profile, hardware_profile, batches, limits)
    if model_profile.fp8:  # whose products have no backward in two passes
        limits = replace(limits, forbid=limits.forbid | {"zero_bubble"})
    setting = Setting(
        model_profile,
        hardware_profile,
        1,
        1,
        batches[0],
        model_profile.seq_len if seq_len is None else seq_len,
        model_profile.precision if precision is None else precision,
        grad_reduce_dtype,
        runtime=limits.runtime,
    )
    limit = hardware_profile.device.memory_bytes if memory_limit_bytes is None else memory_limit_bytes
    job = Job(setting, limits, limit, batches, progress or (lambda line: None), patience)
    family = limits.space if limits.space in FAMILIES else None
    job.look_at_all()
    found = _solve_all(job, num_candidates) if family is None else _solve_family(job, family)
    if not found.solved:
        if found.stopped == "interrupt":
            raise KeyboardInterrupt
        raise infeasible(job)
    return _result(job, found, num_candidates, baselines, start)


@dataclass
class _Found:
    """Solved tasks with their plans, and what became of the others; bounds in seconds a sample."""

    solved: list[tuple[Space, Solution]] = field(default_factory=list)
    lowest: float = math.inf
    bounded_away: int = 0
    infeasible: int = 0
    stopped: Stop | None = None

    def best(self, rank: int = 1) -> float:
        """The ``rank``-th best value in seconds a sample; infinite while there are fewer."""
        values = sorted(map(score, self.solved))
        return values[rank - 1] if len(values) >= rank else math.inf


def _solve_all(job: Job, num_candidates: int) -> _Found:
    """Solve tasks by ascending bound until no other can be among the best ``num_candidates``, or within the gap."""
    found, order = _Found(), job.ascending()
    try:
        while (i := order.first(_worth(job, found, num_candidates))) is not None:
            _solve_one(job, found, i, order.least, num_candidates)
            order.drop()
    except (KeyboardInterrupt, TimeUp) as end:
        found.stopped = _STOPS[type(end)]
        if not found.solved:
            _solve_any(job, found, [i for _, i in order.left])
    else:
        found.infeasible += sum(math.isinf(bound) for bound, _ in order.left)
        found.bounded_away += sum(math.isfinite(bound) for bound, _ in order.left)
    found.lowest = min(found.lowest, order.least)
    found.solved.sort(key=score)
    return found


def _worth(job: Job, found: _Found, num_candidates: int) -> float:
    """Bounds up to this are looked at: what may be a candidate, and of that nothing that is within the gap anyway."""
    worst, gap = _worst(found, num_candidates), job.patience.gap
    return min(worst, found.best() * (1 - gap)) if gap else worst


def _worst(found: _Found, num_candidates: int) -> float:
    """The most that a plan may take to be among those that are replayed."""
    near = max(found.best() * (1 + RUNNER_UP), found.best(min(FEWEST_CANDIDATES, num_candidates)))
    return min(found.best(num_candidates), near)


def _solve_one(job: Job, found: _Found, i: int, bound: float, num_candidates: int) -> None:
    task, worst = job.tasks[i], _worst(found, num_candidates)
    space = job.space(i)
    solved = Solved(None, bound * task.global_batch_size)
    if bound <= found.best():
        solved = solve(space, found.best() * task.global_batch_size, FULL_EFFORT, job.patience)
    if solved.solution is None and solved.lower_bound_s < math.inf:
        # what is not the best is a candidate for the replay alone: near its own best is good enough
        near = solve(space, worst * task.global_batch_size, LITTLE_EFFORT, job.patience)
        solved = Solved(near.solution, max(solved.lower_bound_s, near.lower_bound_s))
    found.lowest = min(found.lowest, solved.lower_bound_s / task.global_batch_size)
    if solved.solution is not None:
        found.solved.append((space, solved.solution))
    elif math.isinf(solved.lower_bound_s):
        found.infeasible += 1
    else:
        found.bounded_away += 1
    missed = "does not fit" if math.isinf(worst) else "is slower"
    outcome = missed if solved.solution is None else f"{solved.solution.value:.4g} s"
    looked_at = len(found.solved) + found.infeasible + found.bounded_away
    job.progress(f"{looked_at}/{len(job.tasks)}: {describe(task)}: {outcome}")


def _solve_any(job: Job, found: _Found, order: Sequence[int]) -> None:
    """Stopped before there was any plan: the first that a little effort finds."""
    job.progress("stopped; looking for any plan")
    for i in order:
        space = job.builder.build(job.tasks[i])
        solution = solve(space, effort=LITTLE_EFFORT).solution
        if solution is not None:
            found.solved.append((space, solution))
            return


def _solve_family(job: Job, name: str) -> _Found:
    best, others = best_of_family(job, name), sum(map(FAMILIES[name].tasks, job.tasks))
    return _Found() if best is None else _Found([best], math.inf, others - 1, len(job.tasks) - others)


def _replayed(job: Job, found: _Found, num_candidates: int) -> list[Plan]:
    """The candidates, fastest replay first; of those that differ by schedule or chunks alone the fastest that fits."""
    plans = [job.predicted(*item) for item in found.solved[:num_candidates]]
    others = [twin for plan in plans for twin in twins(plan, job.setting.model.spec) if _is_allowed(job, twin)]
    plans += [p for p in map(job.with_prediction, others) if predicted(p).peak_memory_bytes <= job.limit]
    return _distinct(sorted(plans, key=_rank))


def _is_allowed(job: Job, twin: Plan) -> bool:
    in_family = job.limits.space not in FAMILIES or twin.model_chunks == 1
    return in_family and job.limits.allows("schedule", twin.schedule)


@dataclass
class _Rivals:
    """What the plan is held against, as far as an interrupt let it be searched."""

    baselines: dict[str, Plan | None] = field(default_factory=dict)
    shortfalls: dict[str, Shortfall] = field(default_factory=dict)
    unlimited: Plan | None = None
    stopped: Stop | None = None


def _rivals(job: Job, optimum: float) -> _Rivals:
    rivals = _Rivals()
    try:
        for name, family in FAMILIES.items():
            job.progress(f"searching the simple plans: {family.words}")
            simple = best_of_family(job, name)
            if simple is None and (short := shortfall_of_family(job, name)) is not None:
                rivals.shortfalls[name] = short
            rivals.baselines[name] = None if simple is None else job.predicted(*simple)
        if job.limits.space not in FAMILIES:
            job.progress("searching with endless memory")
            rivals.unlimited = unlimited(job, optimum)
    except (KeyboardInterrupt, TimeUp) as end:
        rivals.stopped = _STOPS[type(end)]
    return rivals


def _result(job: Job, found: _Found, num_candidates: int, baselines: bool, start: float) -> SearchResult:
    plans, optimum = _replayed(job, found, num_candidates), found.best()
    rivals = _rivals(job, optimum) if baselines and not found.stopped else _Rivals()
    if job.limits.space not in FAMILIES:  # a simple plan of equal objective may be a hair faster when replayed
        faster = [p for p in rivals.baselines.values() if p is not None and _rank(p) < _rank(plans[0])]
        plans = _distinct(sorted([*faster, *plans], key=_rank))
    batch, lowest, cpu_s = plans[0].global_batch_size, min(found.lowest, optimum), time.process_time() - start
    proof = Proof(
        objective_s=optimum * batch,
        lower_bound_s=lowest * batch,
        gap=(optimum - lowest) / optimum,
        num_candidates=len(plans),
        cpu_s=cpu_s,
    )
    counts = Counts(
        tasks=len(job.tasks),
        solved=len(found.solved),
        bounded_away=found.bounded_away,
        infeasible=found.infeasible,
        replayed=len(plans),
        strategies=job.strategies,
        left=len(job.tasks) - len(found.solved) - found.bounded_away - found.infeasible,
    )
    return SearchResult(
        plan=plans[0].model_copy(update={"prediction": predicted(plans[0]).model_copy(update={"proof": proof})}),
        candidates=tuple(plans[1:]),
        baselines=rivals.baselines,
        shortfalls=rivals.shortfalls,
        unlimited=rivals.unlimited,
        memory_limit_bytes=job.limit,
        counts=counts,
        cpu_s=cpu_s,
        stopped=found.stopped or rivals.stopped,
        origins=(job.setting.model.origin, job.setting.hardware.origin),
    )


def _rank(plan: Plan) -> tuple[float, int, bool]:
    return seconds_per_sample(plan), predicted(plan).peak_memory_bytes, plan.schedule == "gpipe"


def _distinct(ranked: Sequence[Plan]) -> list[Plan]:
    """Without those that differ from a better one by their schedule or their chunks' layers alone."""
    seen: dict[tuple[object, ...], Plan] = {}
    for plan in ranked:
        outside = plan.global_batch_size, plan.num_microbatches, plan.model_chunks, plan.embedding, plan.head
        seen.setdefault((*outside, *stage_layers(plan)), plan)
    return list(seen.values())
