"""Is what travels in a step what the cost model takes time for?  Random plans of every family, counted.

    python benchmarks/message_table.py --plans 2 --worlds 2 4 --out messages.json

Number and bytes of every kind of message of every stage's first rank in a step, against those that the cost model's
seconds are made of (``tests/distributed/test_message_table.py``).  Writes JSON: every plan with both; and as Markdown
beside it how many plans of each family hold.  Ends with exit code 1 if any does not.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import transformers
from measure import TESTS, options, parser, save, saved, summary, tracked

from galvatron.core.files import write_atomic
from galvatron.core.hardware import OPS
from galvatron.plan import Plan
from galvatron.testing import Pool
from galvatron.testing.models import VARIANTS

sys.path.insert(0, str(TESTS.parent))
from tests.distributed.test_message_table import costed, mixes, sent, totals

TIMEOUT_S = 1200.0
Case = tuple[str, int, int, Plan]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--plans", type=int, default=2, help="random plans a family and world")
    made.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    made.add_argument("--variants", nargs="+", default=[variant.name for variant in VARIANTS])
    made.add_argument("--seed", type=int, default=2027)
    made.add_argument("--resume", action="store_true", help="keep the rows that --out has")
    given = options(made)
    rows = saved(given.out) if given.resume else []
    done = {(row["variant"], row["world"], row["index"]) for row in rows}
    cases: list[Case] = [
        (variant, world, index, plan)
        for variant in given.variants
        for world in given.worlds
        if not done.issuperset((variant, world, index) for index in range(given.plans))
        for index, plan in enumerate(mixes(variant, world, given.plans, given.seed))
        if (variant, world, index) not in done
    ]
    with Pool(timeout_s=TIMEOUT_S) as pool:
        for case in tracked(cases, lambda case: f"{case[0]} on {case[1]}"):
            rows.append(compared(pool, *case))
            save(given.out, rows, torch=torch.__version__, transformers=transformers.__version__)
    write_atomic(given.out.with_suffix(".md"), table(rows))
    sys.exit(any(row["wrong"] for row in rows))


def compared(pool: Pool, variant: str, world: int, index: int, plan: Plan) -> dict[str, Any]:
    """One plan: of every stage what is found and what is costed, and which of these differ."""
    start = time.perf_counter()
    ranks = pool.run(sent, variant, plan, world_size=world)
    found, expected = [totals(ranks[stage * plan.stage_size]) for stage in range(plan.pp)], costed(variant, plan)
    wrong = [
        {"stage": stage, "op": op, "found": own[op], "costed": of_cost[op]}
        for stage, (own, of_cost) in enumerate(zip(found, expected, strict=True))
        for op in OPS
        if own[op] != of_cost[op]
    ]
    row = {"variant": variant, "world": world, "index": index, "plan": summary(plan)}
    return {**row, "found": found, "wrong": wrong, "wall_s": time.perf_counter() - start}


def table(rows: list[dict[str, Any]]) -> str:
    """Of every family how many plans hold, and how much was counted; then what does not."""
    lines = ["| model | plans | as costed | messages | bytes |", "| --- | --- | --- | --- | --- |"]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        counted = [of_op for row in own for stage in row["found"] for of_op in stage.values()]
        number, num_bytes = (sum(column) for column in zip(*counted, strict=True))
        right = sum(not row["wrong"] for row in own)
        lines.append(f"| {variant} | {len(own)} | {right} | {number:,} | {num_bytes:,} |")
    for row in rows:
        for wrong in row["wrong"]:
            words = f"stage {wrong['stage']}, {wrong['op']}: found {wrong['found']}, costed {wrong['costed']}"
            lines.append(f"\n{row['variant']} on {row['world']}: {words}; {'; '.join(row['plan'])}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
