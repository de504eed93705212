"""What a stage of several stacks holds of the embedding, which runs between stacks too, and copies of tables.

Takes a Setting, a stage's layers and the embedding's strategy; gives memory.  The seconds of the ways between stacks
are measured with the embedding's and count there.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np

from galvatron.plan.axes import divisors
from galvatron.plan.copies import copied_to
from galvatron.plan.plan import LayerStrategy

from .memory import ADAMW_STATES, MASTER_BYTES, UnitMemory, all_unit_memory, copied_bytes, unit_memory
from .setting import Setting
from .sizes import shard_sizes
from .strategies import Ints, Strategies


def joined_memories(
    setting: Setting, layers: range, embedding: LayerStrategy, strategies: Sequence[LayerStrategy]
) -> tuple[UnitMemory, ...]:
    """What a stage with ``layers`` holds: copied tables, what a contrast has alone, and, last, of the embedding.

    What runs before the first stack and what runs behind it live together where a stage has both.  ``strategies``: of
    all layers.
    """
    copies = _copies(setting, layers, strategies)
    if setting.pp == 1 or not setting.model.spec.joints or not _has_embedding(setting, layers):
        return copies
    return (*copies, unit_memory(setting, "embedding", embedding, layers))


def _has_embedding(setting: Setting, layers: range) -> bool:
    return layers.start == 0 or any(joint.layer - 1 in layers for joint in setting.model.spec.joints)


def _copies(setting: Setting, layers: range, strategies: Sequence[LayerStrategy] | None) -> tuple[UnitMemory, ...]:
    """Copied tables and numbers; a first layer's table of which others have copies is whole too.

    ``strategies``: of all layers, to know which part of that counts with the layer; None: none of it.
    """
    spec = setting.model.spec
    held = [(p, 1) for p in spec.numbers] if layers.stop == spec.num_layers else []
    if setting.pp > 1 and spec.joints:
        held += [(p, p.num_elements) for _, _, p in copied_to(spec, layers)]
        for stack in spec.stack_ranges:
            if stack.start in layers and layers.stop < stack.stop:
                shared = [p for p in spec.kind_of_layers()[stack.start].parameters if p.shared]
                own = Strategies.of([] if strategies is None else [strategies[stack.start]])
                held += [(p, p.num_elements - int(shard_sizes([p], own)[0].held.sum())) for p in shared]
    return tuple(_copy(setting, elements, trained=p.trainable) for p, elements in held)


@dataclass(frozen=True)
class Between:
    """What a stage with ``layers`` holds beyond its units, whatever these do."""

    layers: range

    def held_bytes(self, setting: Setting, embeddings: Strategies) -> tuple[Ints, Ints]:
        """The most that stays, and that every microbatch in flight keeps, under every strategy of the embedding."""
        spec, nothing = setting.model.spec, np.zeros(len(embeddings), dtype=np.int64)
        if setting.pp == 1 or not spec.joints:
            return nothing, nothing
        degrees = set(divisors(setting.stage_size))
        kept, passing = side_bytes(setting, self.layers, degrees, degrees, 1)
        copies = sum(int(memory.resident_bytes) for memory in _copies(setting, self.layers, None))
        stays, each = nothing + passing + copies, nothing + kept
        if _has_embedding(setting, self.layers):
            own = all_unit_memory(setting, "embedding", embeddings, self.layers)
            stays, each = stays + own.resident_bytes + own.transient_bytes, each + own.activation_bytes
        if self.layers.start == 0:
            alone = all_unit_memory(setting, "embedding", embeddings)
            stays, each = stays - alone.resident_bytes - alone.transient_bytes, each - alone.activation_bytes
        return stays, each


def side_bytes(
    setting: Setting, layers: range, degrees: Set[int], ungathered: Set[int], before: int
) -> tuple[int, int]:
    """What a stage has of another stack's states, which its layers attend to: (a microbatch's, what passes).

    ``degrees``: by how many its layers, if they do, cut sequences; ``ungathered``: those of layers without tp, others
    keep what they gather.  States that are sent on count with what is sent, where they are as they came.  What a
    stack's first layer looks up for all is looked up anew where a stage begins within.
    """
    spec, kinds = setting.model.spec, setting.model.spec.kind_of_layers()
    if setting.pp == 1 or not spec.joints:
        return 0, 0
    looked_up = 0
    if copies := copied_to(spec, layers):
        first, own = kinds[copies[0][0]].name, kinds[layers.start].name
        looked_up = setting.fixed_bytes(first) - setting.fixed_bytes(own)
    seeing = [kinds[index] for index in layers if kinds[index].sees_side]
    if not seeing:
        return looked_up, 0
    goes_on = layers.stop < len(kinds) and kinds[layers.stop].sees_side
    each = setting.side_bytes(seeing[0].name)
    copies_kept = len(ungathered) - (goes_on and before in ungathered)
    passing = len(degrees | {before}) + goes_on + len(degrees - ungathered)  # gradients, and what is gathered from
    return looked_up + copies_kept * each, passing * each


def _copy(setting: Setting, elements: int, *, trained: bool) -> UnitMemory:
    """A whole copy, nothing of which is sharded."""
    own = elements * MASTER_BYTES
    return UnitMemory.of(own, trained * own, ADAMW_STATES * trained * own, elements * copied_bytes(setting))
