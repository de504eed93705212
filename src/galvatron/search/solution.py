"""What was found for a task: the strategy of every unit, and as which plan.

Knows nothing of how it was found.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from galvatron.core.model import UnitName
from galvatron.plan.plan import LayerStrategy, Plan

from .space import Space


@dataclass(frozen=True)
class Solution:
    """``value``: the additive objective in seconds, or the fullest stage's tensor bytes when memory was the aim."""

    value: float
    layers_per_stage: tuple[int, ...]
    embedding: LayerStrategy
    layers: tuple[LayerStrategy, ...]
    head: LayerStrategy

    def plan(self, space: Space) -> Plan:
        """The solution as a plan."""
        setting, task = space.setting, space.task
        return Plan(
            model=setting.model.spec.name,
            world_size=setting.hardware.world_size,
            layers_per_stage=self.layers_per_stage,
            schedule=task.schedule,
            model_chunks=task.model_chunks,
            num_microbatches=task.num_microbatches,
            global_batch_size=setting.global_batch_size,
            seq_len=setting.seq_len,
            precision=setting.precision,
            grad_reduce_dtype=setting.grad_reduce_dtype,
            embedding=self.embedding,
            layers=self.layers,
            head=self.head,
        )


def grouped(layers: list[LayerStrategy], kinds: list[UnitName]) -> list[LayerStrategy]:
    """The same with equal strategies side by side: among layers of one kind and layout their order costs nothing."""
    grouped: list[LayerStrategy] = []
    pairs = zip(layers, kinds, strict=True)
    for _, members in itertools.groupby(pairs, key=lambda pair: (pair[1], pair[0].sequence_degree)):
        run = [strategy for strategy, _ in members]
        grouped += sorted(run, key=run.index)
    return grouped
