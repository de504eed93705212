"""The simple plans that a searched one is held against: one strategy for all layers.

Takes costed spaces; gives the best plan of each family, or the one that comes nearest to fitting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from galvatron.plan.plan import LayerStrategy

from .bounds import layer_bounds_s
from .solve import Solution, solve
from .space import Space

Family = Callable[[Space, LayerStrategy], bool]

FAMILIES: dict[str, Family] = {
    "dp": lambda space, s: space.task.pp == 1 and s.dp_replicate == s.num_devices,
    "zero3": lambda space, s: space.task.pp == 1 and s.zero == 3 and s.dp_shard == s.num_devices,
    "tp": lambda space, s: space.task.pp == 1 and s.tp == s.num_devices,
    "pp": lambda space, s: s.num_devices == 1,
    "uniform": lambda space, s: True,
}
"""pure data, ZeRO-3, tensor and pipeline parallelism, and any one strategy for all layers; with recompute or not.

The pure ones cut embedding and head as they cut layers; ``uniform`` leaves those two free.
"""


def best_of_family(name: str, spaces: Sequence[Space]) -> tuple[Space, Solution] | None:
    """The family's best plan by the additive objective; None when none fits."""
    members = sorted(_members(name, spaces), key=lambda member: member[0])
    best: tuple[Space, Solution] | None = None
    for bound, _, member in members:
        if math.isinf(bound) or (best is not None and bound >= best[1].value):
            break
        solution = solve(member)
        if solution is not None and (best is None or solution.value < best[1].value):
            best = (member, solution)
    return best


def nearest_of_family(name: str, spaces: Sequence[Space]) -> tuple[Space, Solution] | None:
    """The family's plan of least peak memory, with or without room for it; None when the family is empty."""
    return least_memory([member for _, _, member in _members(name, spaces)])


def least_memory(spaces: Sequence[Space]) -> tuple[Space, Solution] | None:
    """The plan of least peak memory of all ``spaces``; None when there is no plan at all."""
    found = ((space, solve(space, aim="memory")) for space in spaces)
    solved = [(space, solution) for space, solution in found if solution is not None]
    return min(solved, key=lambda item: item[1].value, default=None)


def _members(name: str, spaces: Sequence[Space]) -> Iterator[tuple[float, int, Space]]:
    """(bound, index, space of one layer strategy) for every member; GPipe never beats 1F1B in either aim."""
    index = 0
    for space in spaces:
        if space.task.schedule != "1f1b":
            continue
        bounds = layer_bounds_s(space)
        for option, strategy in enumerate(space.layer.strategies):
            if FAMILIES[name](space, strategy):
                ends = None if name == "uniform" else strategy.model_copy(update={"recompute": "none"})
                yield float(bounds[option]), index, space.restricted([option], ends)
                index += 1
