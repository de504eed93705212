"""What a plan of Hetu-Galvatron can say: its search proposes and its export accepts by these same functions.

Takes a Plan or a strategy; gives the first thing that its file has no word for.
"""

from __future__ import annotations

from typing import Literal

from .plan import LayerStrategy, Plan, Schedule

DataParallel = Literal["ddp", "zero2", "zero3"]
SCHEDULES: dict[str, Schedule] = {"gpipe": "gpipe", "pipedream_flush": "1f1b"}


def inexpressible(plan: Plan) -> str | None:
    """The first thing in the plan that the format has no word for; None where it can say all."""
    if plan.schedule not in SCHEDULES.values():
        return f"schedule={plan.schedule}"
    if plan.embedding != plan.head:
        return f"an embedding ({plan.embedding}) and a head ({plan.head}) that differ"
    for label, strategy in (("embedding", plan.embedding), *((f"layer {i}", s) for i, s in enumerate(plan.layers))):
        problem = inexpressible_strategy(strategy)
        if problem:
            return f"{problem} of {label}"
    if len(data_parallel_types(plan)) > 1:
        return "plain data parallelism and zero 2 in one plan"
    return None


def inexpressible_strategy(strategy: LayerStrategy) -> str | None:
    """The first thing in one unit's strategy that the format has no word for."""
    for name in ("cp", "ep"):
        if getattr(strategy, name) > 1:
            return f"{name}={getattr(strategy, name)}"
    if strategy.tp > 1 and strategy.ulysses > 1:
        return f"tp={strategy.tp} together with ulysses={strategy.ulysses}"
    if strategy.zero == 1:
        return "zero=1"
    if strategy.zero and strategy.dp_replicate > 1:
        return f"dp_replicate={strategy.dp_replicate} of what dp_shard={strategy.dp_shard} shards"
    if strategy.recompute not in ("none", "full"):
        return f"recompute={strategy.recompute}"
    if strategy.offload != "none":
        return f"offload={strategy.offload}"
    return None


def data_parallel_types(plan: Plan) -> set[DataParallel]:
    """What ``default_dp_type`` would have to be, by the strategies that are not ZeRO 3 and hold something twice."""
    default = [s for s in plan.strategies() if s.zero != 3 and (s.dp > 1 or s.ulysses > 1)]
    return {"zero2" if strategy.zero == 2 else "ddp" for strategy in default}
