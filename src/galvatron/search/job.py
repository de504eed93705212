"""One search's tasks with their bounds: what every question about the space is asked of.

Takes a job, limits and batches; gives costed spaces, bounds, and plans with their predictions.  Knows nothing of the
order in which tasks are solved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from galvatron.cost.setting import Setting
from galvatron.cost.step import predict
from galvatron.plan.plan import Plan

from .baselines import FAMILIES, members
from .bounds import free_bound_s, lower_bound_s
from .limits import Limits
from .space import Space, SpaceBuilder, Task, tasks
from .tables import Solution

Progress = Callable[[str], None]


class Job:
    """The tasks of one search; bounds are in seconds a sample, so that batches compare.

    ``bounds[i]``: of task i; ``free[i]``: of task i with endless memory; ``families[name]``: (bound, task) of every
    task that has members of that family.
    """

    def __init__(
        self, setting: Setting, limits: Limits, limit: int, batches: Sequence[int], progress: Progress
    ) -> None:
        self.setting, self.limits, self.limit, self.progress = setting, limits, limit, progress
        self.builder = SpaceBuilder(setting, limits, limit)
        world, layers = setting.hardware.world_size, setting.model.spec.num_layers
        self.tasks = list(tasks(world, layers, batches, limits))
        self.bounds: list[float] = []
        self.free: list[float] = []
        self.families: dict[str, list[tuple[float, int]]] = {name: [] for name in FAMILIES}
        self.strategies = 0

    @property
    def devices_per_node(self) -> int:
        """Devices of a node."""
        return self.setting.hardware.devices_per_node

    def bound_all(self, families: Sequence[str]) -> None:
        """Fill in the bounds of all tasks, and of ``families``."""
        for i, task in enumerate(self.tasks):
            if i % 32 == 0:
                self.progress(f"bounding {i}/{len(self.tasks)} combinations of pipeline and microbatches")
            space, batch = self.builder.build(task), task.global_batch_size
            self.strategies = max(self.strategies, *(len(options) for options in space.options.values()))
            self.bounds.append(lower_bound_s(space) / batch)
            self.free.append(free_bound_s(space) / batch)
            for name in families:
                first = next(members(space, name, self.devices_per_node), None)
                if first is not None:
                    self.families[name].append((first.bound_s / batch, i))

    def predicted(self, space: Space, solution: Solution) -> Plan:
        """A solution as a plan with its prediction."""
        return self.with_prediction(solution.plan(space))

    def with_prediction(self, plan: Plan) -> Plan:
        """``plan`` with its prediction under this job's profiles and memory limit."""
        prediction = predict(plan, self.setting.model, self.setting.hardware, self.limit)
        return plan.model_copy(update={"prediction": prediction})


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
