"""Everything the search may choose, and what each choice costs.

Takes profiles, a batch and a memory limit; gives tasks (pipeline degree, microbatches, schedule) and, for one
task, every strategy the runtime accepts as arrays of seconds and bytes.  Knows nothing of how to choose.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from galvatron.core.model import UnitName
from galvatron.cost.communication import redistribution_s, transfer_s
from galvatron.cost.memory import stage_bytes, unit_memory, usable_bytes
from galvatron.cost.setting import Setting
from galvatron.cost.unit import unit_times
from galvatron.plan.axes import StageAxes, divisors
from galvatron.plan.plan import LayerStrategy, Schedule
from galvatron.plan.rules import check_strategy

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Task:
    """The outside of a plan: what is fixed while layers are divided and strategies chosen."""

    pp: int
    num_microbatches: int
    schedule: Schedule

    def in_flight(self, stage: int) -> int:
        """Microbatches whose activations ``stage`` holds at its peak."""
        return self.num_microbatches if self.schedule == "gpipe" else min(self.num_microbatches, self.pp - stage)


def tasks(world_size: int, num_layers: int, global_batch_size: int) -> Iterator[Task]:
    """Every task that can differ: one schedule is enough without a pipeline or with one microbatch."""
    for pp in divisors(world_size):
        if pp > num_layers:
            continue
        for m in divisors(global_batch_size):
            yield Task(pp, m, "1f1b")
            if pp > 1 and m > 1:
                yield Task(pp, m, "gpipe")


def strategies(stage_size: int) -> Iterator[LayerStrategy]:
    """Every assignment of a stage's axes to tp, dp_shard and dp_replicate, with every ZeRO stage and recompute."""
    degrees = StageAxes(stage_size).degrees
    for tp in degrees:
        for inner in (degree for degree in degrees if degree % tp == 0):
            shard, replicate = inner // tp, stage_size // inner
            for zero in (0,) if shard == 1 else (1, 2, 3):
                for recompute in ("none", "full"):
                    yield LayerStrategy.model_validate(
                        {"tp": tp, "dp_shard": shard, "dp_replicate": replicate, "zero": zero, "recompute": recompute}
                    )


@dataclass(frozen=True)
class Options:
    """The strategies of one unit as arrays: seconds a microbatch (``UnitTimes.work_s``), bytes, layout index."""

    strategies: tuple[LayerStrategy, ...]
    work_s: Floats
    resident_bytes: Ints
    activation_bytes: Ints
    transient_bytes: Ints
    layout: Ints

    def take(self, indices: Sequence[int] | Ints) -> Options:
        """The options at ``indices``, in that order."""
        at = np.asarray(indices, dtype=np.int64)
        return Options(
            tuple(self.strategies[i] for i in at),
            self.work_s[at],
            self.resident_bytes[at],
            self.activation_bytes[at],
            self.transient_bytes[at],
            self.layout[at],
        )

    def held_bytes(self, in_flight: int) -> Ints:
        """What stays, with the activations of ``in_flight`` microbatches."""
        return self.resident_bytes + in_flight * self.activation_bytes


@dataclass(frozen=True)
class Space:
    """All choices of one task, costed.

    ``moves_s[a, b]``: one microbatch's redistribution both ways between layouts a and b, indices into ``layouts``
    (sequence degrees); ``receive_s``: one transfer between stages; ``usable_bytes``: tensors that fit on a device.
    """

    task: Task
    setting: Setting
    layouts: tuple[int, ...]
    embedding: Options
    layer: Options
    head: Options
    moves_s: Floats
    receive_s: float
    usable_bytes: int

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.setting.model.spec.num_layers

    @cached_property
    def end_pairs(self) -> tuple[tuple[int, int], ...] | None:
        """For tied embeddings the (embedding, head) options of equal cuts; None when every pair is allowed."""
        if not self.setting.model.spec.tied_embeddings:
            return None
        heads = {_cuts(strategy): i for i, strategy in enumerate(self.head.strategies)}
        pairs = ((i, heads.get(_cuts(strategy))) for i, strategy in enumerate(self.embedding.strategies))
        return tuple((i, j) for i, j in pairs if j is not None)

    def receives_s(self, stage: int) -> float:
        """Transfers that ``stage`` receives for one microbatch: from before in forward, from behind in backward."""
        return self.receive_s * ((stage > 0) + (stage < self.task.pp - 1))

    def stage_bytes(self, stage: int) -> int:
        """What ``stage`` holds beside its units: outputs and shared tensors of the microbatches in flight."""
        return self.task.in_flight(stage) * stage_bytes(self.setting, stage)

    @property
    def is_empty(self) -> bool:
        """Whether some unit has no strategy at all."""
        missing = not (self.layer.strategies and self.embedding.strategies and self.head.strategies)
        return missing or self.end_pairs == ()

    def restricted(self, layer: Iterable[int], ends: LayerStrategy | None = None) -> Space:
        """This space with only some layer options and, if given, one strategy for embedding and head."""
        smaller = replace(self, layer=self.layer.take(list(layer)))
        if ends is None:
            return smaller
        embedding = [i for i, strategy in enumerate(self.embedding.strategies) if strategy == ends]
        head = [i for i, strategy in enumerate(self.head.strategies) if strategy == ends]
        return replace(smaller, embedding=self.embedding.take(embedding), head=self.head.take(head))


def build_space(task: Task, setting: Setting, memory_limit_bytes: int, max_tp: int | None = None) -> Space:
    """Cost every strategy that the runtime accepts for ``task`` and whose tp was profiled."""
    degrees = [tp for tp in setting.model.tp_degrees() if max_tp is None or tp <= max_tp]
    layouts = tuple(degree for degree in StageAxes(setting.stage_size).degrees if degree in degrees)
    candidates = [s for s in strategies(setting.stage_size) if s.tp in layouts]
    size = len(layouts)
    moves = [[2 * redistribution_s(setting, layouts[a], layouts[b]) for b in range(size)] for a in range(size)]
    return Space(
        task=task,
        setting=setting,
        layouts=layouts,
        embedding=_options(setting, "embedding", candidates, layouts),
        layer=_options(setting, "layer", candidates, layouts),
        head=_options(setting, "head", candidates, layouts),
        moves_s=np.array(moves, dtype=np.float64).reshape(size, size),
        receive_s=transfer_s(setting),
        usable_bytes=usable_bytes(setting, memory_limit_bytes),
    )


def _options(
    setting: Setting, unit: UnitName, candidates: Iterable[LayerStrategy], layouts: tuple[int, ...]
) -> Options:
    accepted = [
        strategy
        for strategy in candidates
        if check_strategy(
            strategy, unit, setting.model.spec, setting.stage_size, setting.micro_batch_size, setting.seq_len
        )
        is None
    ]
    times = [unit_times(setting, unit, strategy) for strategy in accepted]
    memories = [unit_memory(setting, unit, strategy) for strategy in accepted]
    return Options(
        tuple(accepted),
        np.array([unit.work_s(setting) for unit in times], dtype=np.float64),
        np.array([memory.resident_bytes for memory in memories], dtype=np.int64),
        np.array([memory.activation_bytes for memory in memories], dtype=np.int64),
        np.array([memory.transient_bytes for memory in memories], dtype=np.int64),
        np.array([layouts.index(strategy.tp) for strategy in accepted], dtype=np.int64),
    )


def _cuts(strategy: LayerStrategy) -> tuple[int, int, int, int]:
    return strategy.tp, strategy.dp_shard, strategy.dp_replicate, strategy.zero
