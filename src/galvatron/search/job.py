"""One search's tasks with their bounds: what every question about the space is asked of.

Takes a job, limits and batches; gives costed spaces, bounds, and plans with their predictions.  Knows nothing of the
order in which tasks are solved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from galvatron.cost.setting import Setting
from galvatron.cost.step import predict
from galvatron.plan.plan import Plan

from .ascending import Ascending
from .baselines import FAMILIES, members
from .bounds import free_bound_s, lower_bounds_s
from .limits import Limits
from .space import Space, SpaceBuilder, Task, tasks
from .tables import Solution

Progress = Callable[[str], None]


class Job:
    """The tasks of one search; bounds are in seconds a sample, so that batches compare.

    ``free[i]``: of task i with endless memory.
    """

    def __init__(
        self, setting: Setting, limits: Limits, limit: int, batches: Sequence[int], progress: Progress
    ) -> None:
        self.setting, self.limits, self.limit, self.progress = setting, limits, limit, progress
        self.builder = SpaceBuilder(setting, limits, limit)
        world, layers = setting.hardware.world_size, setting.model.spec.num_layers
        self.tasks = list(tasks(world, layers, batches, limits))
        self.free: list[float] = []
        self.strategies = 0
        self._bounds: dict[int, float] = {}
        self._floors: dict[int, float] = {}
        self._plain = {_outside(task): i for i, task in enumerate(self.tasks) if task.schedule == "1f1b"}
        self._interleaved: dict[int, list[int]] = {}
        one_kind = len(setting.model.spec.layers) == 1  # interleaving mixes kinds, which may balance a stage better
        for i, task in enumerate(self.tasks if one_kind else ()):
            if task.schedule == "interleaved" and _outside(task) in self._plain:
                self._interleaved.setdefault(self._plain[_outside(task)], []).append(i)

    @property
    def devices_per_node(self) -> int:
        """Devices of a node."""
        return self.setting.hardware.devices_per_node

    def cost_all(self) -> None:
        """Cost every task's strategies."""
        for i, task in enumerate(self.tasks):
            if i % 32 == 0:
                self.progress(f"costing {i}/{len(self.tasks)} combinations of pipeline and microbatches")
            space = self.builder.build(task)
            self.strategies = max(self.strategies, *(len(options) for options in space.options.values()))
            self.free.append(free_bound_s(space) / task.global_batch_size)

    def ascending(self) -> Ascending:
        """The tasks by what none of their plans is below."""
        return Ascending(self.free, (self._floor, self._bound))

    def family(self, name: str) -> Ascending:
        """The same by what no plan of a family is below; infinite where a task has none."""

        def bound(i: int) -> float:
            first = next(members(self.builder.build(self.tasks[i]), name, self.devices_per_node), None)
            return math.inf if first is None else first.bound_s / self.tasks[i].global_batch_size

        belongs = FAMILIES[name].tasks
        known = [max(free, self._floors.get(i, 0.0), self._bounds.get(i, 0.0)) for i, free in enumerate(self.free)]
        return Ascending([b if belongs(t) else math.inf for b, t in zip(known, self.tasks, strict=True)], (bound,))

    def _floor(self, i: int) -> float:
        """What the 1F1B task of the same stages and microbatches says of an interleaved one."""
        plain = self._plain.get(_outside(self.tasks[i]))
        if plain is not None and i in self._interleaved.get(plain, ()):
            self._bound(plain)
        return self._floors.get(i, 0.0)

    def _bound(self, i: int) -> float:
        """By the dual; what it says of others of the same stages and microbatches is kept."""
        if i not in self._bounds:
            if len(self._bounds) % 32 == 0:
                self.progress(f"bounded {len(self._bounds)} of {len(self.tasks)} combinations")
            kin, space, batch = (
                self._interleaved.get(i, []),
                self.builder.build(self.tasks[i]),
                self.tasks[i].global_batch_size,
            )
            own, *others = lower_bounds_s(space, *(self.builder.setting(self.tasks[j]) for j in kin))
            self._bounds[i] = own / batch
            self._floors |= {j: floor / batch for j, floor in zip(kin, others, strict=True)}
        return self._bounds[i]

    def predicted(self, space: Space, solution: Solution) -> Plan:
        """A solution as a plan with its prediction."""
        return self.with_prediction(solution.plan(space))

    def with_prediction(self, plan: Plan) -> Plan:
        """``plan`` with its prediction under this job's profiles and memory limit."""
        prediction = predict(plan, self.setting.model, self.setting.hardware, self.limit)
        return plan.model_copy(update={"prediction": prediction})


def _outside(task: Task) -> tuple[int, int, int]:
    return task.global_batch_size, task.pp, task.num_microbatches


def score(found: tuple[Space, Solution]) -> float:
    """Seconds a sample of a solved task."""
    space, solution = found
    return solution.value / space.task.global_batch_size


def least(found: tuple[Space, Solution] | None, otherwise: float) -> float:
    """The score of what was found, or ``otherwise``."""
    return otherwise if found is None else score(found)


def describe(task: Task) -> str:
    """A task in a few words."""
    chunks = f" x {task.model_chunks} chunks" if task.model_chunks > 1 else ""
    return (
        f"batch {task.global_batch_size}, {task.pp} stage{'s' * (task.pp > 1)}{chunks}, "
        f"{task.num_microbatches} microbatch{'es' * (task.num_microbatches > 1)}, {task.schedule}"
    )
