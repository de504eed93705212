"""The search: every task bounded, the promising ones solved exactly, the best replayed.

Takes two profiles and a batch; gives a SearchResult.  Deterministic: equal input gives an equal plan.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from galvatron.core.errors import ConfigError, InfeasibleError
from galvatron.core.hardware import HardwareProfile
from galvatron.core.model import ModelProfile, Precision
from galvatron.core.units import format_bytes
from galvatron.cost.setting import Setting
from galvatron.cost.step import predict
from galvatron.plan.axes import divisors
from galvatron.plan.plan import Plan, Prediction, Proof

from .baselines import FAMILIES, best_of_family, least_memory, nearest_of_family
from .bounds import lower_bound_s
from .result import Counts, SearchResult, Shortfall
from .solve import UNLIMITED, Solution, solve
from .space import Space, Task, build_space, tasks

Progress = Callable[[str], None]


def search(
    model_profile: ModelProfile,
    hardware_profile: HardwareProfile,
    *,
    global_batch_size: int,
    seq_len: int | None = None,
    memory_limit_bytes: int | None = None,
    precision: Precision | None = None,
    grad_reduce_dtype: Precision = "fp32",
    pp: int | None = None,
    num_microbatches: int | None = None,
    max_tp: int | None = None,
    num_candidates: int = 8,
    progress: Progress | None = None,
) -> SearchResult:
    """Find the fastest plan that fits.

    Exact for the additive objective over the whole space; the ``num_candidates`` best tasks' plans are replayed
    and the fastest replay is chosen.

    Args:
        model_profile: measured at ``seq_len`` and ``precision``, which default to the profile's own.
        hardware_profile: of the world to plan for.
        global_batch_size: sequences of one step.
        seq_len: tokens of one sequence.
        memory_limit_bytes: per device; defaults to the device's memory.
        precision: compute dtype.
        grad_reduce_dtype: dtype in which gradients are reduced.
        pp: fix the number of stages.
        num_microbatches: fix the number of microbatches.
        max_tp: the largest tp to consider.
        num_candidates: plans to replay.
        progress: called with one line of text a task.

    Raises:
        ConfigError: a fixed dimension does not divide the world, the batch or exceeds the layers.
        ProfileError: a profile lacks a measurement.
        InfeasibleError: no plan fits the memory limit, or none divides the batch.
    """
    start = time.process_time()
    _check(model_profile, hardware_profile, global_batch_size, pp, num_microbatches)
    limit = hardware_profile.device.memory_bytes if memory_limit_bytes is None else memory_limit_bytes
    job = Setting(
        model_profile,
        hardware_profile,
        1,
        1,
        global_batch_size,
        model_profile.seq_len if seq_len is None else seq_len,
        model_profile.precision if precision is None else precision,
        grad_reduce_dtype,
    )
    chosen = [
        task
        for task in tasks(hardware_profile.world_size, model_profile.spec.num_layers, global_batch_size)
        if pp in (None, task.pp) and num_microbatches in (None, task.num_microbatches)
    ]
    spaces = [build_space(task, _setting(job, task), limit, max_tp) for task in chosen]
    found = _solve_all(spaces, num_candidates, progress or (lambda line: None))
    if not found.solved:
        raise _infeasible(spaces, limit)
    return _result(found, spaces, limit, num_candidates, start)


def _setting(job: Setting, task: Task) -> Setting:
    return replace(job, pp=task.pp, num_microbatches=task.num_microbatches)


def _check(model: ModelProfile, hardware: HardwareProfile, batch: int, pp: int | None, m: int | None) -> None:
    for name, value, of_name, of in (
        ("pp", pp, "world_size", hardware.world_size),
        ("num_microbatches", m, "global_batch_size", batch),
    ):
        if value is not None and (value < 1 or of % value):
            choices = ", ".join(map(str, divisors(of)))
            raise ConfigError(f"{name}={value} must divide {of_name}={of}; choose {choices}")
    if pp is not None and pp > model.spec.num_layers:
        raise ConfigError(f"pp={pp} must not exceed the model's {model.spec.num_layers} layers; lower pp")


@dataclass(frozen=True)
class _Found:
    """Solved tasks, best first, and what became of the others."""

    solved: list[tuple[Space, Solution]]
    lower_bound_s: float
    bounded_away: int
    infeasible: int


def _solve_all(spaces: Sequence[Space], num_candidates: int, progress: Progress) -> _Found:
    """Solve tasks by ascending bound until no other can be among the ``num_candidates`` best.

    GPipe holds more microbatches than 1F1B and has the same objective, so 1F1B's optimum bounds it.
    """
    bounds = [lower_bound_s(space) for space in spaces]
    order = sorted(range(len(spaces)), key=lambda i: (bounds[i], spaces[i].task.schedule == "gpipe", i))
    values: dict[Task, float] = {}
    solved: list[tuple[Space, Solution]] = []
    bounded_away = infeasible = 0
    lowest = float("inf")
    for i in order:
        space, task = spaces[i], spaces[i].task
        bound = max(bounds[i], values.get(replace(task, schedule="1f1b"), 0.0))
        if bound == float("inf"):
            infeasible += 1
            continue
        best = sorted(solution.value for _, solution in solved)
        if len(best) >= num_candidates and bound > best[num_candidates - 1]:
            bounded_away += 1
            lowest = min(lowest, bound)
            continue
        solution = solve(space)
        values[task] = float("inf") if solution is None else solution.value
        progress(_line(i, len(spaces), task, solution))
        if solution is None:
            infeasible += 1
        else:
            solved.append((space, solution))
            lowest = min(lowest, solution.value)
    solved.sort(key=lambda item: item[1].value)
    return _Found(solved, lowest, bounded_away, infeasible)


def _line(index: int, total: int, task: Task, solution: Solution | None) -> str:
    outcome = "does not fit" if solution is None else f"{solution.value:.4g} s"
    return (
        f"{index + 1}/{total}: {task.pp} stage{'s' * (task.pp > 1)}, {task.num_microbatches} "
        f"microbatch{'es' * (task.num_microbatches > 1)}, {task.schedule}: {outcome}"
    )


def _predicted(space: Space, solution: Solution, limit: int) -> Plan:
    plan = solution.plan(space)
    setting = space.setting
    return plan.model_copy(update={"prediction": predict(plan, setting.model, setting.hardware, limit)})


def _prediction(plan: Plan) -> Prediction:
    assert plan.prediction is not None
    return plan.prediction


def _rank(plan: Plan) -> tuple[float, int, bool]:
    return _prediction(plan).step_time_s, _prediction(plan).peak_memory_bytes, plan.schedule == "gpipe"


def _distinct(ranked: Sequence[Plan]) -> list[Plan]:
    """Without those that differ from a better one by their schedule alone."""
    seen: dict[tuple[object, ...], Plan] = {}
    for plan in ranked:
        seen.setdefault((plan.num_microbatches, plan.layers_per_stage, *plan.strategies()), plan)
    return list(seen.values())


def _result(found: _Found, spaces: Sequence[Space], limit: int, num_candidates: int, start: float) -> SearchResult:
    replayed = [_predicted(space, solution, limit) for space, solution in found.solved[:num_candidates]]
    replayed = _distinct(sorted(replayed, key=_rank))
    baselines, shortfalls = _baselines(spaces, limit)
    unlimited = _unlimited(spaces, found.solved[0][1].value, limit)
    optimum = found.solved[0][1].value
    cpu_s = time.process_time() - start
    proof = Proof(
        objective_s=optimum,
        lower_bound_s=min(found.lower_bound_s, optimum),
        gap=max(optimum - found.lower_bound_s, 0.0) / optimum,
        num_candidates=len(replayed),
        cpu_s=cpu_s,
    )
    prediction = _prediction(replayed[0]).model_copy(update={"proof": proof})
    return SearchResult(
        plan=replayed[0].model_copy(update={"prediction": prediction}),
        candidates=tuple(replayed[1:]),
        baselines=baselines,
        shortfalls=shortfalls,
        unlimited=unlimited,
        memory_limit_bytes=limit,
        counts=Counts(
            tasks=len(spaces),
            solved=len(found.solved),
            bounded_away=found.bounded_away,
            infeasible=found.infeasible,
            replayed=len(replayed),
        ),
        cpu_s=cpu_s,
    )


def _baselines(spaces: Sequence[Space], limit: int) -> tuple[dict[str, Plan | None], dict[str, Shortfall]]:
    baselines: dict[str, Plan | None] = {}
    shortfalls = {}
    for name in FAMILIES:
        best = best_of_family(name, spaces)
        baselines[name] = None if best is None else _predicted(*best, limit)
        if best is None and (nearest := nearest_of_family(name, spaces)) is not None:
            shortfalls[name] = _shortfall(_predicted(*nearest, limit), limit)
    return baselines, shortfalls


def _shortfall(plan: Plan, limit: int) -> Shortfall:
    peaks = [stage.peak_memory_bytes for stage in _prediction(plan).stages]
    return Shortfall(plan=plan, stage=peaks.index(max(peaks)), bytes_short=max(peaks) - limit)


def _unlimited(spaces: Sequence[Space], optimum_s: float, limit: int) -> Plan | None:
    """The additive optimum with endless memory, where that is faster."""
    free = [replace(space, usable_bytes=UNLIMITED) for space in spaces if space.task.schedule == "1f1b"]
    bounds = [lower_bound_s(space) for space in free]
    best: tuple[Space, Solution] | None = None
    for i in sorted(range(len(free)), key=lambda i: (bounds[i], i)):
        if bounds[i] >= (optimum_s if best is None else best[1].value):
            break
        solution = solve(free[i])
        if solution is not None and solution.value < (optimum_s if best is None else best[1].value):
            best = (free[i], solution)
    return None if best is None else _predicted(*best, limit)


def _infeasible(spaces: Sequence[Space], limit: int) -> InfeasibleError:
    nearest = least_memory([space for space in spaces if space.task.schedule == "1f1b"])
    if nearest is None:
        return InfeasibleError(
            "no strategy divides this batch, sequence and model over the devices; "
            "change global_batch_size, num_microbatches, pp or max_tp",
            constraint="divisibility",
        )
    short = _shortfall(_predicted(*nearest, limit), limit)
    plan, peak = short.plan, limit + short.bytes_short
    enough = f"{math.ceil(peak / 2**20)} MiB"
    return InfeasibleError(
        f"no plan fits in {format_bytes(limit)} a device: the smallest (pp={plan.pp}, "
        f"num_microbatches={plan.num_microbatches}; {plan.layers[0]}) needs {format_bytes(peak)} on stage "
        f"{short.stage}, {format_bytes(short.bytes_short)} too much; allow {enough}, take more devices, "
        "or lower global_batch_size or seq_len",
        constraint=f"memory of stage {short.stage}",
    )
