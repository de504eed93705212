"""What a stage of several stacks holds beyond its units: the way from one stack to the next, and copies of tables.

Takes a Setting, a stage's layers and the embedding's strategies; gives bytes.  The seconds of that way are measured
with the embedding's and count there; so do its activations, of which a stage that has it alone keeps as many.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from galvatron.core.model import ParameterSpec
from galvatron.plan.copies import copied_to
from galvatron.plan.plan import LayerStrategy

from .memory import ADAMW_STATES, MASTER_BYTES, all_unit_memory, copied_bytes
from .setting import Setting
from .strategies import Ints, Strategies


@dataclass(frozen=True)
class Between:
    """What a stage holds beyond its units: ``parameters`` of the embedding and ``copied_bytes`` of tables.

    Where the stage ``begins`` the model, the embedding counts what these keep for the backward.
    """

    parameters: tuple[ParameterSpec, ...]
    begins: bool
    copied_bytes: int

    def held_bytes(self, setting: Setting, embeddings: Strategies) -> tuple[Ints, Ints]:
        """Of it what stays, and what every microbatch in flight keeps, under every strategy of the embedding."""
        if not self.parameters:
            return np.full(len(embeddings), self.copied_bytes), np.zeros(len(embeddings), dtype=np.int64)
        memory = all_unit_memory(setting, "embedding", embeddings, self.parameters)
        stays = self.copied_bytes + memory.resident_bytes + memory.transient_bytes
        return stays, memory.activation_bytes * (not self.begins)


def between(setting: Setting, layers: range) -> Between:
    """Of a stage with ``layers``; nothing without a pipeline."""
    spec = setting.model.spec
    if setting.pp == 1 or not spec.joints:
        return Between((), layers.start == 0, 0)
    counted = {p.name for p in setting.parameters("embedding")} if layers.start == 0 else set()
    if spec.tied_embeddings and layers.stop == spec.num_layers:
        counted.add(spec.embedding.parameters[0].name)
    more = tuple(p for p in spec.embedding_within(layers) if p.name not in counted)
    return Between(more, layers.start == 0, sum(_copy_bytes(setting, p) for _, _, p in copied_to(spec, layers)))


def joint_bytes(setting: Setting, layers: range, embedding: LayerStrategy, alive: int) -> int:
    """What a stage with ``layers`` and ``alive`` microbatches in flight holds of it; 0 without a pipeline."""
    stays, each = between(setting, layers).held_bytes(setting, Strategies.of([embedding]))
    return int(stays[0] + alive * each[0])


def _copy_bytes(setting: Setting, parameter: ParameterSpec) -> int:
    """A whole copy, nothing of which is sharded."""
    each = MASTER_BYTES + (1 + ADAMW_STATES) * MASTER_BYTES * parameter.trainable + copied_bytes(setting)
    return parameter.num_elements * each
