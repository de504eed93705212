"""What every strategy of a task's units costs.

Takes profiles, limits and a memory limit; gives the Space of a task, and what it is not below without costing it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np

from galvatron.core.model import UnitName
from galvatron.cost.communication import redistributions_s
from galvatron.cost.memory import UnitMemory, all_unit_memory
from galvatron.cost.outside import usable_bytes
from galvatron.cost.setting import Setting
from galvatron.cost.strategies import Floats, Ints, Strategies
from galvatron.cost.unit import UnitTimes, all_unit_times
from galvatron.plan.axes import StageAxes
from galvatron.plan.plan import Schedule

from .limits import Limits
from .rows import allowed_rows, fastest_of
from .space import Options, Space
from .tasks import Task

MIN_CACHED, MAX_CACHED_ROWS = 8, 2**18
"""Tasks whose spaces are remembered: these, or as many more as have so many strategies in all."""


@dataclass(frozen=True)
class _Timed:
    """The options of a unit and what they take whatever the schedule."""

    strategies: Strategies
    times: UnitTimes
    layout: Ints


Rows = Callable[[int, UnitName], Strategies]
"""The strategies of a unit in a stage of some devices."""


class SpaceBuilder:
    """Builds the spaces of a job's tasks; remembers the last few, and what (batch, pp, microbatches) cost.

    ``build(task, usable)``: the space of a task; ``usable`` replaces the memory limit.  ``rows``: what is costed,
    if not all that is allowed.
    """

    def __init__(self, job: Setting, limits: Limits, memory_limit_bytes: int, rows: Rows | None = None) -> None:
        self.job = job
        self.limits = limits.of_tied_ends() if job.model.spec.ends_alike else limits
        self.usable_bytes = usable_bytes(job, memory_limit_bytes)
        self.rows: Rows = lru_cache(maxsize=None)(
            rows or (lambda stage_size, unit: allowed_rows(job, self.limits, stage_size, unit))
        )
        self._fastest: Rows = lru_cache(maxsize=None)(lambda *where: fastest_of(self.rows(*where)))
        self._degrees: Callable[[int, UnitName], tuple[Ints, Ints]] = lru_cache(maxsize=None)(
            lambda stage_size, unit: np.unique(self.rows(stage_size, unit).dp, return_counts=True)
        )
        num_rows = sum(len(self.rows(job.hardware.world_size, unit)) for unit in job.model.spec.units)
        remembered = lru_cache(maxsize=max(MIN_CACHED, MAX_CACHED_ROWS // (num_rows + 1)))
        self._times, self._memory = remembered(self._timed), remembered(self._held)
        self._least = lru_cache(maxsize=2)(partial(self._timed, every=self._fastest))
        self.build = remembered(self._build)

    def setting(self, task: Task) -> Setting:
        """The job's setting, of ``task``."""
        return replace(
            self.job,
            pp=task.pp,
            num_microbatches=task.num_microbatches,
            global_batch_size=task.global_batch_size,
            schedule=task.schedule,
            model_chunks=task.model_chunks,
        )

    def _build(self, task: Task, usable: int | None = None) -> Space:
        setting, outside = self.setting(task), (task.global_batch_size, task.pp, task.num_microbatches)
        timed = self._times(*outside, _in_time(task.schedule))
        memory = self._memory(*outside, _in_memory(task.schedule))
        layouts = StageAxes(setting.stage_size).degrees
        moves = {unit: _moves_s(setting, unit, layouts) for unit in setting.model.spec.units[1:]}
        options = {
            unit: Options(
                own.strategies,
                own.times.work_s(setting),
                np.asarray(memory[unit].resident_bytes),
                memory[unit].activation_bytes,
                memory[unit].waiting_bytes * (task.schedule == "zero_bubble"),
                memory[unit].transient_bytes,
                own.layout,
            )
            for unit, own in timed.items()
        }
        return Space(task, setting, layouts, options, moves, self.usable_bytes if usable is None else usable)

    def num_options(self, task: Task) -> int:
        """The most strategies that a unit has."""
        setting, most = self.setting(task), 0
        for unit in setting.model.spec.units:
            degrees, counts = self._degrees(setting.stage_size, unit)
            most = max(most, int(counts[setting.micro_batch_size % degrees == 0].sum()))
        return most

    def least_work_s(self, task: Task) -> dict[UnitName, float]:
        """Of every unit what its fastest option takes, infinite where there is none, without costing all."""
        setting, outside = self.setting(task), (task.global_batch_size, task.pp, task.num_microbatches)
        timed = self._least(*outside, _in_time(task.schedule))
        return {unit: float(own.times.work_s(setting).min(initial=math.inf)) for unit, own in timed.items()}

    def _timed(
        self, batch: int, pp: int, m: int, schedule: Schedule, every: Rows | None = None
    ) -> dict[UnitName, _Timed]:
        setting = replace(self.job, pp=pp, num_microbatches=m, global_batch_size=batch, schedule=schedule)
        layouts = np.array(StageAxes(setting.stage_size).degrees, dtype=np.int64)
        timed = {}
        for unit in setting.model.spec.units:
            rows = (every or self.rows)(setting.stage_size, unit)
            rows = rows.take(setting.micro_batch_size % rows.dp == 0)
            layout = np.searchsorted(layouts, rows.sequence_degree).astype(np.int64)
            timed[unit] = _Timed(rows, all_unit_times(setting, unit, rows), layout)
        return timed

    def _held(self, batch: int, pp: int, m: int, schedule: Schedule) -> dict[UnitName, UnitMemory]:
        setting = replace(self.job, pp=pp, num_microbatches=m, global_batch_size=batch, schedule=schedule)
        timed = self._times(batch, pp, m, _in_time(schedule))
        return {unit: all_unit_memory(setting, unit, own.strategies) for unit, own in timed.items()}


def _in_time(schedule: Schedule) -> Schedule:
    """A schedule whose units take the same."""
    return "gpipe" if schedule == "gpipe" else "1f1b"


def _in_memory(schedule: Schedule) -> Schedule:
    """A schedule whose units hold the same."""
    return schedule if schedule in ("gpipe", "zero_bubble") else "1f1b"


def _moves_s(setting: Setting, unit: UnitName, layouts: tuple[int, ...]) -> Floats:
    moves: Floats = 2 * setting.whole_fill * redistributions_s(setting, unit, np.array(layouts, dtype=np.int64))
    return moves
