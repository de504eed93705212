"""Everything the search may choose, and what each choice costs.

Takes profiles, a batch and limits; gives tasks (batch, pipeline degree, microbatches, schedule) and, for one task,
every strategy of every unit as arrays of seconds and bytes.  Knows nothing of how to choose.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from galvatron.core.model import ENDS, ModelSpec, UnitName
from galvatron.cost.communication import redistributions_s
from galvatron.cost.memory import UnitMemory, all_unit_memory, bytes_in_flight, usable_bytes
from galvatron.cost.setting import Setting
from galvatron.cost.strategies import Floats, Ints, Strategies
from galvatron.cost.unit import UnitTimes, all_unit_times
from galvatron.plan.axes import StageAxes, divisors
from galvatron.plan.plan import Schedule
from galvatron.plan.rules import STACKED_SCHEDULES, check_schedule
from galvatron.plan.schedules import InFlight

from .geometry import Geometry
from .limits import Limits
from .rows import allowed_rows, cuts_of

MAX_CHUNKS = 8
"""Most model chunks a stage that are tried: beyond it a bubble of (pp - 1) / v microbatches hardly shrinks while
messages multiply [Assumed]."""


MIN_CACHED, MAX_CACHED_ROWS = 8, 2**18
"""Tasks whose spaces are remembered: these, or as many more as have so many strategies in all."""


@dataclass(frozen=True, slots=True)
class Task:
    """The outside of a plan: what is fixed while layers are divided and strategies chosen."""

    global_batch_size: int
    pp: int
    num_microbatches: int
    schedule: Schedule = "1f1b"
    model_chunks: int = 1


def tasks(world_size: int, num_layers: int, batch_sizes: Sequence[int], limits: Limits) -> Iterator[Task]:
    """Every task that can differ.

    Without a pipeline there is nothing to schedule.  GPipe has 1F1B's objective and holds no fewer microbatches, so
    it is searched where 1F1B is not allowed.
    """
    schedules: list[tuple[Schedule, int]] = [("1f1b", 1)]
    schedules += [("interleaved", v) for v in range(2, MAX_CHUNKS + 1)] + [("zero_bubble", 1)]
    if not limits.allows("schedule", "1f1b"):
        schedules.insert(0, ("gpipe", 1))
    for batch, pp in itertools.product(batch_sizes, divisors(world_size)):
        if pp > num_layers or not limits.allows("pp", pp):
            continue
        for m in divisors(batch):
            if not limits.allows("num_microbatches", m):
                continue
            if pp == 1:
                yield Task(batch, pp, m)
            else:
                yield from (Task(batch, pp, m, s, v) for s, v in schedules if _worth(s, v, pp, m, num_layers, limits))


def suits(task: Task, spec: ModelSpec) -> bool:
    """Whether a model can be trained so: several stacks by schedules of one chunk, a contrast by one microbatch."""
    if spec.task == "contrast" and task.num_microbatches > 1:
        return False
    return spec.stacks == 1 or task.pp == 1 or task.schedule in STACKED_SCHEDULES


def _worth(schedule: Schedule, chunks: int, pp: int, m: int, num_layers: int, limits: Limits) -> bool:
    if pp * chunks > num_layers or not (limits.allows("schedule", schedule) and limits.allows("model_chunks", chunks)):
        return False
    # with one microbatch there is nothing to interleave with, and no weight gradient to put off
    return check_schedule(schedule, pp, m, chunks) is None and (m > 1 or schedule in ("1f1b", "gpipe"))


@dataclass(frozen=True)
class Options:
    """The strategies of one unit as arrays: seconds a microbatch (``UnitTimes.work_s``), bytes, layout index."""

    strategies: Strategies
    work_s: Floats
    resident_bytes: Ints
    activation_bytes: Ints
    waiting_bytes: Ints
    transient_bytes: Ints
    layout: Ints

    def __len__(self) -> int:
        return len(self.work_s)

    def take(self, at: Ints) -> Options:
        """The options at indices ``at``, in that order."""
        return Options(
            self.strategies.take(at),
            self.work_s[at],
            self.resident_bytes[at],
            self.activation_bytes[at],
            self.waiting_bytes[at],
            self.transient_bytes[at],
            self.layout[at],
        )

    def free(self) -> Options:
        """The same strategies at no cost."""
        no_bytes = np.zeros(len(self), dtype=np.int64)
        return Options(self.strategies, np.zeros(len(self)), no_bytes, no_bytes, no_bytes, no_bytes, self.layout)

    def held_bytes(self, in_flight: InFlight) -> Ints:
        """What stays, with what microbatches in flight keep."""
        return self.resident_bytes + bytes_in_flight(in_flight, self.activation_bytes, self.waiting_bytes)

    @cached_property
    def index(self) -> dict[tuple[int, ...], int]:
        """The option of every strategy, by its fields."""
        return {row: i for i, row in enumerate(self.strategies.rows())}


@dataclass(frozen=True)
class Space:
    """All choices of one task, costed.

    ``moves_s[unit][a, b]``: what a microbatch's redistribution both ways into ``unit`` adds to the work, between
    layouts a and b, indices into ``layouts`` (sequence degrees); ``usable_bytes``: tensors that fit on a device;
    ``whole``: the space of which this one has a part of the options.
    """

    task: Task
    setting: Setting
    layouts: tuple[int, ...]
    options: Mapping[UnitName, Options]
    moves_s: Mapping[UnitName, Floats]
    usable_bytes: int
    whole: Space | None = None

    @property
    def is_joined(self) -> bool:
        """Whether stages hold parts of the embedding that run between stacks, by its strategy."""
        return self.task.pp > 1 and bool(self.setting.model.spec.joints)

    @cached_property
    def geometry(self) -> Geometry:
        """Of the whole space: what is left of the options makes no difference to it, but the embedding's if it is one.

        Where several may be the embedding's, what depends on which is left out: a space of more plans.
        """
        if self.is_joined and len(self.options["embedding"]) == 1:
            return Geometry(self.setting, self.options["embedding"].strategies[0])
        return Geometry(self.setting) if self.whole is None else self.whole.geometry

    @property
    def is_empty(self) -> bool:
        """Whether some unit has no strategy at all."""
        return not all(len(options) for options in self.options.values()) or self.end_pairs == ()

    @cached_property
    def end_pairs(self) -> tuple[tuple[int, int], ...] | None:
        """The (embedding, head) options of equal strategies, where ends have to be alike; None when any pair may be."""
        if not (self.setting.model.spec.ends_alike or self.setting.runtime == "hetu"):
            return None
        if self.whole is not None and all(self.options[end] is self.whole.options[end] for end in ENDS):
            return self.whole.end_pairs
        head = self.options["head"].index
        pairs = ((i, head.get(strategy)) for strategy, i in self.options["embedding"].index.items())
        return tuple((i, j) for i, j in pairs if j is not None)

    @cached_property
    def alternatives(self) -> tuple[Space, ...]:
        """Spaces that are this one together, in each of which, ends apart, any options go together.

        Hetu-Galvatron's plans have one kind of data parallelism beside ZeRO 3: none or ZeRO 2.
        """
        found = [self]
        if self.setting.runtime == "hetu":
            columns = {unit: options.strategies for unit, options in self.options.items()}
            without_2 = {unit: np.flatnonzero(s.zero != 2) for unit, s in columns.items()}
            with_2 = {unit: np.flatnonzero((s.zero > 0) | (s.dp * s.ulysses == 1)) for unit, s in columns.items()}
            found = [self.restricted(without_2), self.restricted(with_2)]
        return tuple(space for space in found if not space.is_empty)

    def without_bytes(self) -> Space:
        """This space where nothing holds anything; of options that take as long those that held less come first."""

        def alone(options: Options) -> Options:
            first = options.take(np.lexsort((options.resident_bytes + options.activation_bytes, options.work_s)))
            return replace(first.free(), work_s=first.work_s)

        return replace(self, options={unit: alone(options) for unit, options in self.options.items()}, whole=self)

    def with_free_ends(self) -> Space:
        """This space with an embedding and a head that take no time and hold nothing."""
        ends = {end: self.options[end].take(np.zeros(1, dtype=np.int64)).free() for end in ENDS}
        return replace(self, options={**self.options, **ends}, whole=self)

    def with_joined_ends(self, pairs: Sequence[tuple[int, int]]) -> Space:
        """This space where one stage holds both ends, which are ``pairs`` of one layout.

        Each pair is an embedding; the head takes nothing and is there for its layout.
        """
        first, last = np.array(pairs).T
        embedding, head = self.options["embedding"].take(first), self.options["head"].take(last)
        joined = Options(
            embedding.strategies,
            embedding.work_s + head.work_s,
            embedding.resident_bytes + head.resident_bytes,
            embedding.activation_bytes + head.activation_bytes,
            embedding.waiting_bytes + head.waiting_bytes,
            np.maximum(embedding.transient_bytes, head.transient_bytes),
            embedding.layout,
        )
        ends = {"embedding": joined, "head": head.take(np.zeros(1, dtype=np.int64)).free()}
        return replace(self, options={**self.options, **ends}, whole=self)

    @cached_property
    def layer_layouts(self) -> Ints:
        """The layouts that layers may have, ascending."""
        found: Ints = np.unique(np.concatenate([self.options[k.name].layout for k in self.setting.model.spec.layers]))
        return found

    @property
    def least_move_s(self) -> float:
        """What a change of layout among the layers adds to the work at least; infinite where they have but one."""
        at = self.layer_layouts
        moves = [self.moves_s[kind.name][np.ix_(at, at)] for kind in self.setting.model.spec.layers]
        return float(np.min([move[~np.eye(len(at), dtype=bool)].min(initial=math.inf) for move in moves]))

    def in_layout(self, layout: int) -> Space:
        """This space with only those options of the layers whose layout is ``layout``."""
        kinds = [kind.name for kind in self.setting.model.spec.layers]
        return self.restricted({kind: np.flatnonzero(self.options[kind].layout == layout) for kind in kinds})

    def restricted(self, chosen: Mapping[UnitName, Ints]) -> Space:
        """This space with only the ``chosen`` options of some units."""
        smaller = {name: options.take(chosen[name]) for name, options in self.options.items() if name in chosen}
        return replace(self, options={**self.options, **smaller}, whole=self)


@dataclass(frozen=True)
class _Costed:
    """What a unit's options cost whatever the schedule."""

    strategies: Strategies
    times: UnitTimes
    memory: UnitMemory
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
        self._cuts: Callable[[int, UnitName], Strategies] = lru_cache(maxsize=None)(
            lambda stage_size, unit: cuts_of(self.rows(stage_size, unit))
        )
        self._degrees: Callable[[int, UnitName], tuple[Ints, Ints]] = lru_cache(maxsize=None)(
            lambda stage_size, unit: np.unique(self.rows(stage_size, unit).dp, return_counts=True)
        )
        num_rows = sum(len(self.rows(job.hardware.world_size, unit)) for unit in job.model.spec.units)
        remembered = lru_cache(maxsize=max(MIN_CACHED, MAX_CACHED_ROWS // (num_rows + 1)))
        self._passes = lru_cache(maxsize=2)(self._pass_times)
        self._costs, self.build = remembered(self._cost), remembered(self._build)

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
        setting = self.setting(task)
        costs = self._costs(task.global_batch_size, task.pp, task.num_microbatches, _to_a_unit(task.schedule))
        layouts = StageAxes(setting.stage_size).degrees
        moves = {unit: _moves_s(setting, unit, layouts) for unit in setting.model.spec.units[1:]}
        options = {
            unit: Options(
                cost.strategies,
                cost.times.work_s(setting),
                np.asarray(cost.memory.resident_bytes),
                cost.memory.activation_bytes,
                cost.memory.waiting_bytes * (task.schedule == "zero_bubble"),
                cost.memory.transient_bytes,
                cost.layout,
            )
            for unit, cost in costs.items()
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
        """Of every unit what no option's work is less than: its passes alone, a row for every way to cut it.

        A tenth or a hundredth of the rows of ``build``.  Infinite where a unit has no options.
        """
        setting = self.setting(task)
        passes = self._passes(task.global_batch_size, task.pp, task.num_microbatches, _to_a_unit(task.schedule))
        return {unit: float(times.work_s(setting).min(initial=math.inf)) for unit, times in passes.items()}

    def _pass_times(self, batch: int, pp: int, m: int, schedule: Schedule) -> dict[UnitName, UnitTimes]:
        setting = replace(self.job, pp=pp, num_microbatches=m, global_batch_size=batch, schedule=schedule)
        times = {}
        for unit in setting.model.spec.units:
            cuts = self._cuts(setting.stage_size, unit)
            times[unit] = all_unit_times(setting, unit, cuts.take(setting.micro_batch_size % cuts.dp == 0)).passes()
        return times

    def _cost(self, batch: int, pp: int, m: int, schedule: Schedule) -> dict[UnitName, _Costed]:
        setting = replace(self.job, pp=pp, num_microbatches=m, global_batch_size=batch, schedule=schedule)
        layouts = np.array(StageAxes(setting.stage_size).degrees, dtype=np.int64)
        costs = {}
        for unit in setting.model.spec.units:
            rows = self.rows(setting.stage_size, unit)
            rows = rows.take(setting.micro_batch_size % rows.dp == 0)
            times, memory = all_unit_times(setting, unit, rows), all_unit_memory(setting, unit, rows)
            costs[unit] = _Costed(rows, times, memory, np.searchsorted(layouts, rows.sequence_degree).astype(np.int64))
        return costs


def _to_a_unit(schedule: Schedule) -> Schedule:
    """A schedule whose units cost the same."""
    return schedule if schedule in ("gpipe", "zero_bubble") else "1f1b"


def _moves_s(setting: Setting, unit: UnitName, layouts: tuple[int, ...]) -> Floats:
    moves: Floats = 2 * setting.whole_fill * redistributions_s(setting, unit, np.array(layouts, dtype=np.int64))
    return moves
