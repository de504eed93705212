"""What the best plan is held against: simple plans, the same space with endless memory, and what comes nearest.

Takes a bounded Job; gives plans.  Knows nothing of how the best plan was found.
"""

from __future__ import annotations

import math

from galvatron.core.errors import InfeasibleError
from galvatron.core.units import enough_bytes, format_bytes
from galvatron.plan.plan import Plan

from .baselines import FAMILIES, leanest, members
from .checks import why_empty
from .job import Job, least
from .result import Shortfall, predicted
from .smallest import smallest
from .solution import Solution
from .solve import UNLIMITED, solve
from .space import Space

Found = tuple[Space, Solution]


def best_of_family(job: Job, name: str) -> Found | None:
    """The family's best plan by the additive objective; None when none fits."""
    best: Found | None = None
    order = job.family(name)
    while (i := order.first(least(best, math.inf))) is not None:
        order.drop()
        batch, space = job.tasks[i].global_batch_size, job.of_family(name).build(job.tasks[i])
        for member in members(space, name, job.devices_per_node):
            limit = least(best, math.inf) * batch
            if member.bound_s >= limit:
                break
            smaller = space.restricted(member.chosen)
            solution = solve(smaller, limit, patience=job.patience).solution
            if solution is not None and solution.value < limit:
                best = smaller, solution
    return best


def shortfall_of_family(job: Job, name: str) -> Shortfall | None:
    """How the family's plan of least peak memory fails to fit; None when the family is empty."""
    found = []
    for task in job.tasks:
        if FAMILIES[name].tasks(task) and task.schedule in ("gpipe", "1f1b"):
            space = job.of_family(name).build(task, UNLIMITED)
            member = leanest(space, name, job.devices_per_node)
            if member is not None:
                smaller = space.restricted(member.chosen)
                found.append((smaller, smallest(smaller)))
    nearest = _nearest(found)
    return None if nearest is None else shortfall(job, nearest)


def unlimited(job: Job, optimum: float) -> Plan | None:
    """The additive optimum with endless memory, where that is faster than ``optimum`` seconds a sample."""
    best: Found | None = None
    order = job.without_limit()
    while (i := order.first(least(best, optimum) * (1 - 1e-9))) is not None:
        order.drop()
        limit = least(best, optimum)
        batch, space = job.tasks[i].global_batch_size, job.builder.build(job.tasks[i], UNLIMITED).without_bytes()
        solution = solve(space, limit * batch, patience=job.patience).solution
        if solution is not None and solution.value / batch < limit:
            best = space, solution
    return None if best is None else job.predicted(*best)


def infeasible(job: Job) -> InfeasibleError:
    """Why nothing fits: the plan of least peak memory, and by how much it fails."""
    name = job.limits.space
    short = shortfall_of_family(job, name) if name in FAMILIES else _shortfall(job)
    if short is None:
        return InfeasibleError(why_empty(job.setting, job.limits, job.batches), constraint="divisibility")
    plan, peak = short.plan, job.limit + short.bytes_short
    what, wider = (f"no plan of space={name}", "widen it with space=runtime, ") if name in FAMILIES else ("no plan", "")
    has_room = peak <= job.setting.hardware.device.memory_bytes
    allow = f"allow {enough_bytes(peak)}, " if has_room else ""
    return InfeasibleError(
        f"{what} fits in {format_bytes(job.limit)} a device: the smallest (pp={plan.pp}, "
        f"num_microbatches={plan.num_microbatches}; {plan.layers[0]}) needs {enough_bytes(peak)} on stage "
        f"{short.stage}, {format_bytes(short.bytes_short)} too much; {allow}"
        f"take more devices, {wider}or lower global_batch_size or seq_len",
        constraint=f"memory of stage {short.stage}",
        needed_bytes=peak,
    )


def _shortfall(job: Job) -> Shortfall | None:
    leanest_tasks = [task for task in job.tasks if task.schedule in ("gpipe", "1f1b")] or job.tasks
    spaces = [job.builder.build(task, UNLIMITED) for task in leanest_tasks]
    nearest = _nearest([(space, smallest(space)) for space in spaces])
    return None if nearest is None else shortfall(job, nearest)


def shortfall(job: Job, found: Found) -> Shortfall:
    """By how much a plan exceeds the limit, and on which stage."""
    plan = job.predicted(*found)
    peaks = [stage.peak_memory_bytes for stage in predicted(plan).stages]
    return Shortfall(plan=plan, stage=peaks.index(max(peaks)), bytes_short=max(peaks) - job.limit)


def _nearest(found: list[tuple[Space, Solution | None]]) -> Found | None:
    solved = [(space, solution) for space, solution in found if solution is not None]
    return min(solved, key=lambda item: item[1].value, default=None)
