"""One search's tasks with their bounds: what every question about the space is asked of.

Takes a job, limits and batches; gives costed spaces, bounds, and plans with their predictions.  Knows nothing of the
order in which tasks are solved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

from galvatron.core.units import counted
from galvatron.cost.setting import Setting
from galvatron.cost.step import predict
from galvatron.plan.plan import Plan

from .ascending import Ascending
from .baselines import FAMILIES, members, rows_of
from .bounds import fastest_s, lower_bounds_s
from .builder import SpaceBuilder
from .limits import Limits
from .patience import ENDLESS, Patience
from .solution import Solution
from .space import Space
from .tasks import Task, suits, tasks
from .unbeaten import without_beaten

Progress = Callable[[str], None]

LEAN = 32  # tasks whose spaces are remembered without what is beaten in them


class Job:
    """The tasks of one search; bounds are in seconds a sample, so that batches compare.

    ``least[i]``: what task i is not below with endless memory; ``strategies``: the most that a unit has in any task.
    """

    def __init__(
        self,
        setting: Setting,
        limits: Limits,
        limit: int,
        batches: Sequence[int],
        progress: Progress,
        patience: Patience = ENDLESS,
    ) -> None:
        self.setting, self.limits, self.limit, self.progress = setting, limits, limit, progress
        self.patience = patience
        self.batches = tuple(batches)
        self._arguments = setting, limits, limit
        self.builder = SpaceBuilder(*self._arguments)
        world, spec = setting.hardware.world_size, setting.model.spec
        self.tasks = [task for task in tasks(world, spec.num_layers, batches, limits) if suits(task, spec)]
        self.least: list[float] = []
        self.strategies = 0
        self._lean = lru_cache(maxsize=LEAN)(
            lambda i: replace(without_beaten(self.builder.build(self.tasks[i])), whole=None)
        )
        self._families: dict[str, SpaceBuilder] = {}
        self._bounds: dict[int, float] = {}
        self._floors: dict[int, float] = {}
        # several kinds are mixed by interleaving, which may balance stages better: 1F1B then says nothing of them
        self._plain = _plain(self.tasks) if len(setting.model.spec.layers) == 1 else {}

    @property
    def devices_per_node(self) -> int:
        """Devices of a node."""
        return self.setting.hardware.devices_per_node

    def of_family(self, name: str) -> SpaceBuilder:
        """Builds spaces of the strategies of a family's members alone."""
        if name not in self._families:
            rows = rows_of(name, self.devices_per_node, self.builder.rows)
            self._families[name] = self.builder if name == "uniform" else SpaceBuilder(*self._arguments, rows)
        return self._families[name]

    def space(self, i: int) -> Space:
        """Of task i, without options that are beaten by others."""
        return self._lean(i)

    def look_at_all(self) -> None:
        """Bound every task by the fastest of its strategies."""
        for i, task in enumerate(self.tasks):
            if i % 32 == 0:
                self.progress(f"looking at {i}/{len(self.tasks)} combinations of pipeline and microbatches")
            self.strategies = max(self.strategies, self.builder.num_options(task))
            bound = fastest_s(self.builder.setting(task), self.builder.least_work_s(task))
            self.least.append(bound / task.global_batch_size)

    def ascending(self) -> Ascending:
        """The tasks by what none of their plans is below."""
        return Ascending(self.least, (self._floor, self._bound))

    def family(self, name: str) -> Ascending:
        """The same by what no plan of a family is below; infinite where a task has none."""

        def bound(i: int) -> float:
            first = next(members(self.of_family(name).build(self.tasks[i]), name, self.devices_per_node), None)
            return math.inf if first is None else first.bound_s / self.tasks[i].global_batch_size

        belongs = FAMILIES[name].tasks
        bounds = (self._floors, self._bounds)
        known = [max(least, *(of.get(i, 0.0) for of in bounds)) for i, least in enumerate(self.least)]
        return Ascending([b if belongs(t) else math.inf for b, t in zip(known, self.tasks, strict=True)], (bound,))

    def without_limit(self) -> Ascending:
        """The tasks by what none of their plans is below with endless memory."""
        return Ascending(self.least, ())

    def _floor(self, i: int) -> float:
        """What the 1F1B task of the same stages and microbatches says of an interleaved one."""
        if i in self._plain:
            self._bound(self._plain[i])
        return self._floors.get(i, 0.0)

    def _bound(self, i: int) -> float:
        """By the dual; what it says of others of the same stages and microbatches is kept."""
        if i not in self._bounds:
            self.patience.check()
            if len(self._bounds) % 32 == 0:
                self.progress(f"bounded {len(self._bounds)} of {len(self.tasks)} combinations")
            kin, batch = [j for j, plain in self._plain.items() if plain == i], self.tasks[i].global_batch_size
            settings = [self.builder.setting(self.tasks[j]) for j in kin]
            own, *others = lower_bounds_s(self.builder.build(self.tasks[i]), *settings)
            self._bounds[i] = own / batch
            self._floors |= {j: floor / batch for j, floor in zip(kin, others, strict=True)}
        return self._bounds[i]

    def predicted(self, space: Space, solution: Solution) -> Plan:
        """A solution as a plan with its prediction."""
        return self.with_prediction(solution.plan(space))

    def with_prediction(self, plan: Plan) -> Plan:
        """``plan`` with its prediction under this job's profiles and memory limit."""
        setting = self.setting
        prediction = predict(plan, setting.model, setting.hardware, self.limit, setting.runtime)
        return plan.model_copy(update={"prediction": prediction})


def _plain(tasks: Sequence[Task]) -> dict[int, int]:
    """For every interleaved task the 1F1B task of the same batch, stages and microbatches, where there is one."""
    outside = [(task.global_batch_size, task.pp, task.num_microbatches) for task in tasks]
    plain = {outside[i]: i for i, task in enumerate(tasks) if task.schedule == "1f1b"}
    interleaved = [i for i, task in enumerate(tasks) if task.schedule == "interleaved"]
    return {i: plain[outside[i]] for i in interleaved if outside[i] in plain}


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
        f"batch {task.global_batch_size}, {counted(task.pp, 'stage')}{chunks}, "
        f"{counted(task.num_microbatches, 'microbatch')}, {task.schedule}"
    )
