"""Does any plan compute what one process computes?  Pure and random plans of every family and world.

    python benchmarks/parity_sweep.py --plans 40 --worlds 2 4 8 --out parity.json

Writes JSON: for every variant and world the number of plans that hold, the worst error of each kind, and
each plan that fails with what was found.  Ends with exit code 1 if any fails.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from galvatron.core.files import write_atomic
from galvatron.core.records import dump_json
from galvatron.plan import Plan
from galvatron.testing import Pool, Recipe, WorkerError
from galvatron.testing.compare import TOLERANCES
from galvatron.testing.models import VARIANTS
from galvatron.testing.plans import pure_plans, random_plans
from galvatron.testing.sweep import Sweep, variant_spec

CLIPPED = Recipe(max_grad_norm=0.1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=40, help="random plans per variant and world")
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--variants", nargs="+", default=[variant.name for variant in VARIANTS])
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def check(sweep: Sweep, variant: str, plan: Plan, recipe: Recipe) -> tuple[dict[str, float], str | None]:
    """Worst errors, and what was wrong if anything was."""
    try:
        report = sweep.parity(variant, plan, recipe)
    except WorkerError as failure:
        return {}, str(failure)
    return report.worst, None if report.ok else report.explain()


def row(sweep: Sweep, variant: str, world_size: int, count: int, seed: int) -> dict[str, Any]:
    """All plans of one variant and world; every fourth random plan also clips gradients."""
    spec = variant_spec(variant, world_size)
    plans = [(name, plan, Recipe()) for name, plan in pure_plans(spec, world_size).items()]
    for index, plan in enumerate(random_plans(spec, world_size, count, seed)):
        plans.append((f"random {index}", plan, CLIPPED if index % 4 == 3 else Recipe()))
    worst = dict.fromkeys(TOLERANCES, 0.0)
    failures = []
    start = time.perf_counter()
    for name, plan, recipe in plans:
        errors, found = check(sweep, variant, plan, recipe)
        worst = {kind: max(worst[kind], errors.get(kind, 0.0)) for kind in worst}
        if found:
            failures.append({"plan_name": name, "found": found, "plan": json.loads(plan.to_json())})
    return {
        "variant": variant,
        "world_size": world_size,
        "num_plans": len(plans),
        "num_random_plans": count,
        "num_failed": len(failures),
        "worst": {kind: error if math.isfinite(error) else None for kind, error in worst.items()},
        "elapsed_s": time.perf_counter() - start,
        "failures": failures,
    }


def main() -> int:
    options = arguments()
    rows = []
    with Pool() as pool, tempfile.TemporaryDirectory() as folder:
        for variant in options.variants:
            for world_size in options.worlds:
                sweep = Sweep(pool, Path(folder))
                rows.append(row(sweep, variant, world_size, options.plans, options.seed))
                report = {
                    "seed": options.seed,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "tolerances": TOLERANCES,
                    "rows": rows,
                }
                write_atomic(options.out, dump_json(report))
                latest = rows[-1]
                print(variant, world_size, f"{latest['num_failed']} of {latest['num_plans']} failed", flush=True)
    return int(any(row["num_failed"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
