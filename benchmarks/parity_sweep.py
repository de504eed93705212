"""Does any plan compute what one process computes?  Pure and random plans of every family, world and mode.

    python benchmarks/parity_sweep.py --plans 40 --worlds 2 4 8 --out parity.json

Random plans are dealt the modes in turn: fp32, fp16 and bf16 against one process in the same precision (models without
jumps, see ``Variant.config``), and compiled layers in fp32 against one that compiles nothing.  Writes JSON: for every
variant, world and mode the number of plans that hold, the worst error of each kind, the largest error of a gradient by
plan, each plan that fails with what was found, and each that another draw decided, for one process itself was off
float64 (``testing.parity.decided``); and as Markdown beside it who holds under which technique.
Ends with exit code 1 if any fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
import transformers

from galvatron.core.files import write_atomic
from galvatron.core.model import Precision
from galvatron.core.records import dump_json
from galvatron.plan import Plan
from galvatron.testing import Pool, Recipe, WorkerError
from galvatron.testing.compare import KINDS, TOLERANCES
from galvatron.testing.models import VARIANTS
from galvatron.testing.plans import pure_plans, random_plans
from galvatron.testing.sweep import Sweep, seq_len_for, variant_spec

CLIPPED = Recipe(max_grad_norm=0.1)
COMPILED = "compiled"
RANDOM = "random"
DEALS = 7
TIMEOUT_S = 1200.0  # compiling on a busy machine
Case = tuple[str, str, Plan, Recipe]
"""The plan's name, its mode, itself and how it trains."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=40, help="random plans per variant and world")
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4, 6, 8])
    parser.add_argument("--variants", nargs="+", default=[variant.name for variant in VARIANTS])
    parser.add_argument(
        "--modes", nargs="+", default=["fp32"], choices=[*get_args(Precision), COMPILED], help="may repeat a mode"
    )
    parser.add_argument("--engine", default="inductor", help="torch.compile's; aot_eager makes graphs, but no code")
    parser.add_argument("--no-pure", action="store_true", help="leave out the plans of one technique (in fp32)")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out has")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def check(
    sweep: Sweep, variant: str, mode: str, plan: Plan, recipe: Recipe, engine: str
) -> tuple[dict[str, float], str | None, list[str]]:
    """Worst errors, what was wrong if anything was, and what draws decided nothing."""
    compiled = mode == COMPILED
    plan = plan if compiled else plan.model_copy(update={"precision": mode})
    try:
        report = sweep.parity(variant, plan, recipe, engine=engine if compiled else None)
    except WorkerError as failure:
        return {}, str(failure), []
    return report.worst, None if report.ok else report.explain(), [str(own) for own in report.undecided]


def cases(
    variant: str, world_size: int, options: argparse.Namespace, modes: Iterator[str], first: int
) -> Iterator[Case]:
    """All plans of one variant and world, random ones from the ``first`` on; every fourth of these clips gradients."""
    spec = variant_spec(variant, world_size)
    seq_len = None if spec.task == "image_classification" else seq_len_for(world_size)
    if not options.no_pure:
        for name, plan in pure_plans(spec, world_size, seq_len).items():
            yield name, "fp32", plan, Recipe()
    plans = random_plans(spec, world_size, first + options.plans, options.seed, seq_len)
    for index, plan in list(enumerate(plans))[first:]:
        yield f"{RANDOM} {index}", next(modes), plan, CLIPPED if index % 4 == 3 else Recipe()


def rows(sweep: Sweep, variant: str, world_size: int, chosen: list[Case], engine: str) -> Iterator[dict[str, Any]]:
    """A row a mode."""
    for mode in sorted({case[1] for case in chosen}):
        own = [case for case in chosen if case[1] == mode]
        worst = dict.fromkeys(KINDS, 0.0)
        failures, gradients, undecided = [], {}, {}
        start = time.perf_counter()
        for name, _, plan, recipe in own:
            errors, found, unsure = check(sweep, variant, mode, plan, recipe, engine)
            worst = {kind: max(worst[kind], errors.get(kind, 0.0)) for kind in worst}
            gradients[name] = None if found else errors["gradient"]
            if unsure:
                undecided[name] = unsure
            if found:
                failures.append({"plan_name": name, "found": found, "plan": json.loads(plan.to_json())})
        yield {
            "variant": variant,
            "world_size": world_size,
            "mode": mode,
            "num_plans": len(own),
            "num_failed": len(failures),
            "worst": {kind: error if math.isfinite(error) else None for kind, error in worst.items()},
            "gradient_errors": gradients,
            "elapsed_s": time.perf_counter() - start,
            "undecided_draws": undecided,
            "failures": failures,
        }


def markdown(found: list[dict[str, Any]]) -> str:
    """Models x techniques: the largest gradient error of the pure plans; "-" where the rules forbid one; and mixes."""
    techniques = dict.fromkeys(
        name for row in found for name in row.get("gradient_errors", ()) if not name.startswith(RANDOM)
    )
    lines = [["model", "ranks", *techniques, "mixes"]]
    for variant, world_size in dict.fromkeys((row["variant"], row["world_size"]) for row in found):
        errors: dict[str, float | None] = {}
        for row in found:
            if (row["variant"], row["world_size"]) == (variant, world_size):
                errors |= {
                    f"{name} {row['mode']}" if name.startswith(RANDOM) else name: error
                    for name, error in row.get("gradient_errors", {}).items()
                }
        mixes = [error for name, error in errors.items() if name.startswith(RANDOM)]
        held = f"{sum(error is not None for error in mixes)} of {len(mixes)}" if mixes else "-"
        lines.append([variant, str(world_size), *(_cell(errors, name) for name in techniques), held])
    rule = ["---"] * len(lines[0])
    return "".join("| " + " | ".join(line) + " |\n" for line in (lines[0], rule, *lines[1:]))


def _cell(errors: dict[str, float | None], name: str) -> str:
    if name not in errors:
        return "-"
    error = errors[name]
    return "FAILS" if error is None else f"{error:.0e}"


def main() -> int:
    options = arguments()
    found: list[dict[str, Any]] = (
        json.loads(options.out.read_text())["rows"] if options.resume and options.out.is_file() else []
    )
    kept = {(row["variant"], row["world_size"], row["mode"]) for row in found}
    modes = itertools.cycle(options.modes)
    with Pool(timeout_s=TIMEOUT_S) as pool, tempfile.TemporaryDirectory() as folder:
        for number, (world_size, variant) in enumerate(itertools.product(options.worlds, options.variants)):
            # few plans a row shall still have all depths and schedules, which random plans are dealt in turn
            chosen = list(cases(variant, world_size, options, modes, first=number % DEALS))
            chosen = [case for case in chosen if (variant, world_size, case[1]) not in kept]
            for row in rows(Sweep(pool, Path(folder)), variant, world_size, chosen, options.engine):
                found.append(row)
                report = {
                    "seed": options.seed,
                    "engine": options.engine,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "tolerances": TOLERANCES,
                    "rows": found,
                }
                write_atomic(options.out, dump_json(report))
                write_atomic(options.out.with_suffix(".md"), markdown(found))
                counts = f"{row['num_failed']} of {row['num_plans']} failed"
                print(variant, world_size, row["mode"], counts, f"{row['elapsed_s']:.0f} s", flush=True)
    return int(any(row["num_failed"] for row in found))


if __name__ == "__main__":
    raise SystemExit(main())
