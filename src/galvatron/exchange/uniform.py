"""Systems that have one strategy for all layers: is this plan one of theirs?

Takes a plan; gives the strategy that all its layers share, or one sentence that names where they differ.
"""

from __future__ import annotations

from galvatron.core.errors import PlanError
from galvatron.plan.plan import LayerStrategy, Plan, runs

REMEDY = "run it with galvatron, or search a plan without it"


def refuse(system: str, what: str) -> PlanError:
    """The error that ``what`` of a plan has no word in ``system``."""
    return PlanError(f"{system} cannot say {what}; {REMEDY}")


def one_strategy(plan: Plan, system: str, ignoring_recompute: bool = False) -> LayerStrategy:
    """The strategy of all layers, where embedding and head are cut alike.

    With ``ignoring_recompute`` layers may differ in what they recompute, and the strategy recomputes nothing.

    Raises:
        PlanError: layers differ, or an end is cut otherwise.
    """

    def seen(strategy: LayerStrategy) -> LayerStrategy:
        return strategy.model_copy(update={"recompute": "none"}) if ignoring_recompute else strategy

    if any(strategy.offload != "none" for strategy in plan.strategies()):
        raise refuse(system, "offload=optimizer as it is meant here (moments alone, updated on the device)")
    strategies = runs(tuple(seen(strategy) for strategy in plan.layers))
    if len(strategies) > 1:
        listed = " and ".join(f"{_layers(first, last)} ({strategy})" for first, last, strategy in strategies)
        raise refuse(system, f"more than one strategy for layers, and here they are {listed}")
    strategy = strategies[0][2]
    wanted = end_of(strategy)
    for name, end in (("embedding", plan.embedding), ("head", plan.head)):
        if end != wanted:
            raise refuse(
                system, f"an end that is cut unlike the layers, and here the {name} is ({end}), not ({wanted})"
            )
    return strategy


def end_of(strategy: LayerStrategy) -> LayerStrategy:
    """How the ends are cut where layers are cut by ``strategy``: the same tokens, no rings, experts or recompute."""
    update = {"ulysses": strategy.ulysses * strategy.cp, "cp": 1, "ep": 1, "recompute": "none"}
    return strategy.model_copy(update=update)


def recomputed_prefixes(plan: Plan, system: str) -> tuple[int, ...]:
    """How many layers each entry of ``layers_per_stage`` recomputes in full: always its first ones.

    Raises:
        PlanError: a layer recomputes in part, or a recomputed layer follows one that is not.
    """
    counts: list[int] = []
    start = 0
    for length in plan.layers_per_stage:
        chunk = [plan.layers[start + i].recompute for i in range(length)]
        for level in set(chunk) - {"none", "full"}:
            raise refuse(system, f"recompute={level} as it is meant here (its own selection is of other operations)")
        count = chunk.count("full")
        if chunk != ["full"] * count + ["none"] * (length - count):
            raise refuse(
                system,
                f"recompute of any but the first layers of a stage, and here {_where(plan, start, length)}",
            )
        counts.append(count)
        start += length
    return tuple(counts)


def _where(plan: Plan, start: int, length: int) -> str:
    recomputes = tuple(LayerStrategy(recompute=s.recompute) for s in plan.layers[start : start + length])
    parts = (f"{_layers(start + i, start + j)} recompute {s.recompute}" for i, j, s in runs(recomputes))
    return ", ".join(parts)


def _layers(first: int, last: int) -> str:
    return f"layers {first}-{last}" if last > first else f"layer {first}"
