"""Bytes of one unit on the fullest rank, from shapes and from how FSDP2 allocates.

Takes a Setting, a unit and a strategy; gives exact parameter, gradient and optimizer bytes, and an interval for
what passes.  Knows nothing of stages: ``step`` and ``search`` add units up.

What torch 2.13 allocates (``torch/distributed/fsdp/_fully_shard``), per parameter of local shape (d0, …) after
the tensor cut, with s = dp_shard:

* held: ceil(d0 / s) rows in float32 on every rank, padding included (``_fsdp_param.py``, ``padded_sharded_param``);
  its gradient likewise; AdamW adds two tensors of the shard's shape;
* gathered: s times that in the compute dtype, a copy even when s is 1 (``init_all_gather_outputs``);
* while gathering: a flat buffer of the whole group of parameters (``foreach_all_gather``);
* while reducing: a flat buffer of the group in the reduce dtype (``foreach_reduce``), which lives on until the
  next group reduces;
* between microbatches without reduction: whole gradients in the reduce dtype (``unsharded_accumulated_grad``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from galvatron.core.model import ParameterSpec, UnitName
from galvatron.core.units import DTYPE_BYTES
from galvatron.plan.plan import LayerStrategy

from .setting import Setting

MASTER_BYTES = DTYPE_BYTES["fp32"]  # parameters, reduced gradients and both AdamW states are float32
ADAMW_STATES = 2  # exp_avg and exp_avg_sq


@dataclass(frozen=True, slots=True)
class ShardSize:
    """Elements of one unit on the fullest rank.

    ``held``: its shard, padding included; ``whole``: after the tensor cut, before sharding; ``uncut``: the part
    of ``held`` that every tp rank has too.
    """

    held: int
    whole: int
    uncut: int


def shard_size(parameters: Iterable[ParameterSpec], tp: int, dp_shard: int) -> ShardSize:
    """Sum over ``parameters`` of what rank 0, the fullest, holds of each."""
    held = whole = uncut = 0
    for parameter in parameters:
        shape = parameter.local_shape(tp)
        shard = math.ceil(shape[0] / dp_shard) * math.prod(shape[1:])
        held += shard
        whole += math.prod(shape)
        if parameter.cut is None or parameter.cut.is_whole(tp):
            uncut += shard
    return ShardSize(held, whole, uncut)


@dataclass(frozen=True, slots=True)
class UnitMemory:
    """Bytes of one unit on the fullest rank.

    ``unsharded_bytes`` stay for the whole step (gathered parameters, whole gradients); ``activation_bytes`` are
    those of one microbatch; ``transient_bytes`` come and go with the unit's turn, so that a stage needs only the
    largest of its units'.
    """

    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    unsharded_bytes: int
    activation_bytes: int
    transient_bytes: int

    @property
    def resident_bytes(self) -> int:
        """What stays through the step whatever is in flight."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.unsharded_bytes


def unit_memory(setting: Setting, unit: UnitName, strategy: LayerStrategy) -> UnitMemory:
    """Memory of ``unit`` under ``strategy``; raises ProfileError when its activations were not counted."""
    size = shard_size(setting.parameters(unit), strategy.tp, strategy.dp_shard)
    sample = setting.activation_sample(unit, strategy.tp, strategy.recompute)
    batch = setting.micro_batch_size // strategy.dp
    workspace = batch * sample.workspace_bytes_per_sequence
    gathered = size.held * strategy.dp_shard * setting.compute_bytes
    reduced = size.held * strategy.dp_shard * setting.reduce_bytes
    stays = stays_gathered(setting, unit, strategy)
    gradient = size.held * MASTER_BYTES
    passing = 0 if stays else gathered
    # autograd adds to whole gradients in place; only where they change dtype or are reduced are there new ones
    in_place = _accumulates(setting, strategy) and setting.compute_bytes == setting.reduce_bytes
    new_gradients = 0 if in_place else size.whole * setting.compute_bytes
    flat_buffers = gathered * (strategy.dp_shard > 1) + reduced
    return UnitMemory(
        parameter_bytes=size.held * MASTER_BYTES,
        gradient_bytes=gradient,
        optimizer_bytes=ADAMW_STATES * size.held * MASTER_BYTES,
        unsharded_bytes=(gathered if stays else 0) + _accumulated_bytes(setting, strategy, size, gradient),
        activation_bytes=sample.fixed_bytes + batch * sample.bytes_per_sequence,
        transient_bytes=passing + flat_buffers + new_gradients + max(workspace, size.held * setting.reduce_bytes),
    )


def stays_gathered(setting: Setting, unit: UnitName, strategy: LayerStrategy) -> bool:
    """Whether gathered parameters stay through the step: always below ZeRO 3, and in a group tied to the head.

    The tied group's backward begins where its forward ends, so it is sharded again for no time at all.
    """
    return strategy.zero != 3 or (unit == "embedding" and setting.shares_tied_weight)


def _accumulates(setting: Setting, strategy: LayerStrategy) -> bool:
    """Whether whole gradients wait for the last microbatch."""
    return strategy.zero < 2 and setting.num_microbatches > 1


def _accumulated_bytes(setting: Setting, strategy: LayerStrategy, size: ShardSize, gradient_bytes: int) -> int:
    """Whole gradients kept between microbatches, beyond the reduced gradient that takes their place at the end."""
    return max(size.whole * setting.reduce_bytes - gradient_bytes, 0) if _accumulates(setting, strategy) else 0


def stage_bytes(setting: Setting, stage: int) -> int:
    """What one microbatch in flight keeps on ``stage`` beyond its units' activations.

    A stage keeps its output until the backward (the next stage's profile does not count it here), and every
    stage but the first makes its own of what layers share, which the profile counts with the embedding.
    """
    output = setting.boundary_bytes if stage < setting.pp - 1 else 0
    shared = (
        setting.activation_sample("embedding", setting.model.tp_degrees()[0], "none").fixed_bytes if stage > 0 else 0
    )
    return output + shared


CUDA_CONTEXT_BYTES = 2**30
"""CUDA context, cuBLAS workspace and NCCL buffers of one process: outside PyTorch's allocator, so not in its
statistics.  [Assumed: 1 GiB; to be measured per device]"""

CUDA_ALLOCATOR_SLACK = 0.03
"""What PyTorch's CUDA allocator reserves beyond what is allocated.  [Assumed: 3%; to be measured per device]"""


def usable_bytes(setting: Setting, memory_limit_bytes: int) -> int:
    """How many bytes of tensors fit under the limit, context and allocator slack taken off (CUDA alone)."""
    if not setting.overlaps:
        return memory_limit_bytes
    return int((memory_limit_bytes - CUDA_CONTEXT_BYTES) / (1 + CUDA_ALLOCATOR_SLACK))


def runtime_bytes(setting: Setting, tensor_bytes: int) -> int:
    """What the process takes beyond its tensors: the inverse of ``usable_bytes``."""
    return CUDA_CONTEXT_BYTES + math.ceil(tensor_bytes * CUDA_ALLOCATOR_SLACK) if setting.overlaps else 0
