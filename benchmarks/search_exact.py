"""Is the search exact?  Small random spaces, every plan of which is enumerated.

    python benchmarks/search_exact.py --instances 600 --out search_exact.json

Takes the instances of ``tests/unit/search/test_brute_force.py``.  Writes JSON: how often search and enumeration agree
(the same best objective, or both nothing that fits), how often a bound exceeds the optimum (never, if it is one), how
often each dimension was in the space and in the chosen plan, and every instance's numbers.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from typing import Any

import measure
import numpy as np

from galvatron.core.errors import InfeasibleError
from galvatron.core.model import RECOMPUTES
from galvatron.core.model_profile import ModelProfile
from galvatron.plan import Plan
from galvatron.search import search

sys.path.insert(0, str(measure.TESTS))
from unit.search.enumerate_plans import Choice, every_task, plans_of
from unit.search.test_brute_force import instance, random_limit, room_of

TOLERANCE = 1e-9  # relative: sums of the same numbers in another order


def arguments() -> argparse.Namespace:
    parser = measure.parser(__doc__)
    parser.add_argument("--instances", type=int, default=600)
    parser.add_argument("--first-seed", type=int, default=0)
    return measure.options(parser)


def row(seed: int) -> dict[str, Any]:
    """One instance enumerated and searched."""
    model, hardware, batches, choice, limits, shake = instance(seed)
    start = time.process_time()
    settings = [setting for batch in batches for setting in every_task(model, hardware, batch, choice)]
    found = [(o / s.global_batch_size, peaks) for s in settings for o, peaks in plans_of(s, choice)]
    objectives, peaks = (np.concatenate(columns) for columns in zip(*found, strict=True))
    limit = random_limit(shake, np.unique(peaks), hardware.device.type)
    fitting = objectives[peaks <= room_of(limit, hardware.device.type)]
    enumerated_s, num_candidates = time.process_time() - start, shake.choice([1, 8])
    numbers = {
        "seed": seed,
        "world_size": hardware.world_size,
        "num_layers": model.spec.num_layers,
        "plans": len(objectives),
        "fitting": len(fitting),
        "tasks": len(settings),
        "offered": offered(model, choice, batches),
        "enumeration_cpu_s": enumerated_s,
    }
    try:
        searched_s, result = measure.timed(
            lambda: search(
                model,
                hardware,
                global_batch_size=batches,
                memory_limit_bytes=limit,
                limits=limits,
                num_candidates=num_candidates,
                baselines=False,
            )
        )
    except InfeasibleError:
        return {**numbers, "status": "infeasible", "agrees": not len(fitting), "bound_exceeds": False, "chosen": []}
    if not len(fitting):
        return {**numbers, "status": "found", "agrees": False, "bound_exceeds": False, "chosen": []}
    proof, plan = result.prediction.proof, result.plan
    assert proof is not None
    optimum, objective = float(fitting.min()), proof.objective_s / plan.global_batch_size
    return {
        **numbers,
        "status": "found",
        "search_cpu_s": searched_s,
        "agrees": math.isclose(objective, optimum, rel_tol=TOLERANCE) and fits(plan, limit),
        "relative_error": objective / optimum - 1,
        "bound_exceeds": proof.lower_bound_s / plan.global_batch_size > optimum * (1 + TOLERANCE),
        "gap": proof.gap,
        "chosen": used(plan, model, batches),
    }


def fits(plan: Plan, limit: int) -> bool:
    assert plan.prediction is not None
    return plan.prediction.peak_memory_bytes <= limit


def offered(model: ModelProfile, choice: Choice, batches: tuple[int, ...]) -> list[str]:
    """The dimensions that an instance's space has."""
    values = choice.values
    names = [name for name in ("tp", "ulysses", "cp", "ep", "dp_shard") if len(values[name]) > 1]
    names += [f"zero {zero}" for zero in values["zero"] if zero] + [
        mode for mode in values["recompute"] if mode != "none"
    ]
    names += [schedule for schedule, _ in choice.schedules]
    return [*names, *traits(model, batches)]


def used(plan: Plan, model: ModelProfile, batches: tuple[int, ...]) -> list[str]:
    """The dimensions that a chosen plan makes use of."""
    strategies = plan.strategies()
    names = [n for n in ("tp", "ulysses", "cp", "ep", "dp_shard") if any(getattr(s, n) > 1 for s in strategies)]
    names += [f"zero {zero}" for zero in (1, 2, 3) if any(s.zero == zero for s in strategies)]
    names += [level for level in RECOMPUTES[1:] if any(s.recompute == level for s in strategies)]
    names += [plan.schedule] if plan.pp > 1 else []
    names += ["uneven stages"] if len(set(plan.layers_per_stage)) > 1 else []
    names += ["layers that differ"] if len(set(plan.layers)) > 1 else []
    return [*names, *traits(model, batches)]


def traits(model: ModelProfile, batches: tuple[int, ...]) -> list[str]:
    named = {
        "several kinds": len(model.spec.layers) > 1,
        "tied embeddings": model.spec.tied_embeddings,
        "several batches": len(batches) > 1,
    }
    return [name for name, has in named.items() if has]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    offered_, chosen = (Counter(name for row in rows for name in row[key]) for key in ("offered", "chosen"))
    return {
        "instances": len(rows),
        "agree": sum(row["agrees"] for row in rows),
        "infeasible_in_both": sum(row["status"] == "infeasible" and row["agrees"] for row in rows),
        "disagree": [row["seed"] for row in rows if not row["agrees"]],
        "bound_exceeds_optimum": sum(row["bound_exceeds"] for row in rows),
        "largest_relative_error": max((abs(row.get("relative_error", 0.0)) for row in rows), default=0.0),
        "largest_gap": max((row.get("gap", 0.0) for row in rows), default=0.0),
        "plans_enumerated": sum(row["plans"] for row in rows),
        "plans_that_fit": sum(row["fitting"] for row in rows),
        "tasks": sum(row["tasks"] for row in rows),
        "enumeration_cpu_s": sum(row["enumeration_cpu_s"] for row in rows),
        "search_cpu_s": sum(row.get("search_cpu_s", 0.0) for row in rows),
        "offered": dict(sorted(offered_.items())),
        "chosen": dict(sorted(chosen.items())),
    }


def main() -> int:
    options = arguments()
    seeds = range(options.first_seed, options.first_seed + options.instances)
    rows = [row(seed) for seed in measure.tracked(seeds, lambda seed: f"seed {seed}")]
    total = summary(rows)
    measure.save(options.out, rows, summary=total)
    numbers = [(name, value) for name, value in total.items() if name not in ("offered", "chosen")]
    measure.show("search against enumeration", ("", "all instances"), numbers)
    names = sorted({*total["offered"], *total["chosen"]})
    counts = [(name, total["offered"].get(name), total["chosen"].get(name, 0)) for name in names]
    measure.show("instances with each dimension", ("dimension", "in the space", "in the chosen plan"), counts)
    return int(total["agree"] < len(rows) or total["bound_exceeds_optimum"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
