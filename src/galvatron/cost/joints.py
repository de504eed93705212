"""What a stage of several stacks holds beyond its units: the way from one stack to the next, and copies of tables.

Takes a Setting, a stage's layers and the embedding's strategy; gives bytes.  The seconds of that way are measured with
the embedding's and count there; so do its activations, of which a stage that has it alone is taken to keep as many.
"""

from __future__ import annotations

from galvatron.core.model import ParameterSpec
from galvatron.plan.copies import copied_to
from galvatron.plan.plan import LayerStrategy

from .memory import ADAMW_STATES, MASTER_BYTES, copied_bytes, unit_memory
from .setting import Setting


def joint_bytes(setting: Setting, layers: range, embedding: LayerStrategy, alive: int) -> int:
    """What a stage with ``layers`` and ``alive`` microbatches in flight holds of it; 0 without a pipeline."""
    spec = setting.model.spec
    if setting.pp == 1 or not spec.joints:
        return 0
    counted = {p.name for p in setting.parameters("embedding")} if layers.start == 0 else set()
    if spec.tied_embeddings and layers.stop == spec.num_layers:
        counted.add(spec.embedding.parameters[0].name)
    more = tuple(p for p in spec.embedding_within(layers) if p.name not in counted)
    total = sum(_copy_bytes(setting, p) for _, _, p in copied_to(spec, layers))
    if more:
        memory = unit_memory(setting, "embedding", embedding, more)
        total += int(memory.resident_bytes + memory.transient_bytes)
        total += alive * int(memory.activation_bytes) * (layers.start > 0)
    return total


def _copy_bytes(setting: Setting, parameter: ParameterSpec) -> int:
    """A whole copy, nothing of which is sharded."""
    each = MASTER_BYTES + (1 + ADAMW_STATES) * MASTER_BYTES * parameter.trainable + copied_bytes(setting)
    return parameter.num_elements * each
