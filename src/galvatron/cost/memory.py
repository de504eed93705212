"""Bytes of one unit on the fullest rank under many strategies at once, from shapes and from how the runtime allocates.

Takes a Setting, a unit and strategies; gives exact parameter, gradient and optimizer bytes, and an interval for
what passes.  Knows nothing of stages: ``step`` and ``search`` add units up.

Moments that are offloaded are nowhere on the device but in the slices that pass through it at the update
(``plan.offload``), when activations are gone: they count as one more thing that comes and goes.

Where nothing is sharded (ZeRO 0, ``parallelize/sharding/unsharded.py``), 8 bytes a parameter before AdamW's 8, 10 in
a half precision:

* float32 parameters and a float32 gradient, to which every microbatch adds in place;
* a copy of the parameters in the compute dtype where that is another;
* one parameter's gradient at a time on its way from autograd, but for the head's projection (``loss``); the head's
  labels.

What torch 2.13 allocates under ZeRO 1 to 3 (``torch/distributed/fsdp/_fully_shard``), per parameter of local shape
(d0, …) after the tensor cut, with s the ranks that it is sharded over:

* held: ceil(d0 / s) rows in float32 on every rank, padding included (``_fsdp_param.py``, ``padded_sharded_param``);
  its gradient likewise; AdamW adds two tensors of the shard's shape (neither for what is frozen);
* gathered: s times that in the compute dtype (``init_all_gather_outputs``);
* while gathering: a flat buffer of the whole group of parameters (``foreach_all_gather``);
* while reducing: a flat buffer of the group in the reduce dtype (``foreach_reduce``), which lives on until the
  next group reduces;
* between microbatches without reduction: whole gradients in the reduce dtype (``unsharded_accumulated_grad``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from galvatron.core.model import ENDS, RECOMPUTES, ParameterSpec, UnitName
from galvatron.core.units import DTYPE_BYTES
from galvatron.plan.offload import slot_bytes
from galvatron.plan.plan import LayerStrategy
from galvatron.plan.schedules import InFlight

from .capacity import kept
from .setting import Setting
from .sizes import ShardSize, dealt_kv_heads, expert_ranks, held_and_trained
from .strategies import NONE, Floats, Ints, Strategies

MASTER_BYTES = DTYPE_BYTES["fp32"]  # parameters, reduced gradients and both AdamW states are float32
LABEL_BYTES = INDEX_BYTES = 8  # int64
ADAMW_STATES = 2  # exp_avg and exp_avg_sq
REDISTRIBUTED_TENSORS = 3
"""Boundary tensors alive in a change of layout: what was there, what is sent and what comes.  They add to the peak only
where no backward does: it needs more, later, while less of the forward is alive."""


@dataclass(frozen=True, slots=True)
class UnitMemory:
    """Bytes of one unit on the fullest rank, one row a strategy.

    ``unsharded_bytes`` stay for the whole step (gathered parameters, whole gradients); ``activation_bytes`` are
    those of one microbatch, ``waiting_bytes`` what its weight pass needs under zero bubble; ``transient_bytes`` come
    and go with the unit's turn, so that a stage needs only the largest of its units'.
    """

    parameter_bytes: Ints
    gradient_bytes: Ints
    optimizer_bytes: Ints
    unsharded_bytes: Ints
    activation_bytes: Ints
    waiting_bytes: Ints
    transient_bytes: Ints

    @classmethod
    def of(cls, *stays: int) -> UnitMemory:
        """One row that ``stays``: parameters, gradients, optimizer, unsharded."""
        return cls(*(np.array(n, dtype=np.int64) for n in (*stays, 0, 0, 0)))

    def held_bytes(self, in_flight: InFlight) -> Ints:
        """What microbatches in flight keep."""
        return bytes_in_flight(in_flight, self.activation_bytes, self.waiting_bytes)

    @property
    def resident_bytes(self) -> Ints:
        """What stays through the step whatever is in flight."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.unsharded_bytes

    def row(self, row: int) -> UnitMemory:
        """The bytes of one strategy, as arrays without dimensions."""
        return UnitMemory(*(getattr(self, field.name)[row] for field in fields(self)))


def unit_memory(setting: Setting, unit: UnitName, strategy: LayerStrategy, layers: range | None = None) -> UnitMemory:
    """Memory of ``unit`` under one strategy; raises ProfileError when its activations were not counted."""
    return all_unit_memory(setting, unit, Strategies.of([strategy]), layers).row(0)


def all_unit_memory(
    setting: Setting, unit: UnitName, strategies: Strategies, layers: range | None = None
) -> UnitMemory:
    """Memory of ``unit`` under every strategy; raises ProfileError when its activations were not counted.

    ``layers``: of a pipeline's embedding what a stage with these has (``Setting.parameters``).
    """
    s, (cuts, which) = strategies, strategies.cuts
    own = setting.parameters(unit, layers)
    parts, kept = s.parameter_cuts
    (dense, experts), (trained_dense, trained_experts) = (
        (of_dense.take(kept), of_experts.take(kept)) for of_dense, of_experts in held_and_trained(own, parts)
    )
    held, trained = dense.held + experts.held, trained_dense.held + trained_experts.held
    whole = trained_dense.whole + trained_experts.whole
    if setting.model.spec.is_idle(unit):
        return _idle_memory(setting, s, held)
    activations, workspace = (column[which] for column in _passing_bytes(setting, unit, cuts, layers))
    gathered = (dense.held * s.shard + experts.held * s.expert_shard) * setting.compute_bytes
    reduced = (trained_dense.held * s.shard + trained_experts.held * s.expert_shard) * setting.reduce_bytes
    stays = stays_gathered(setting, unit, s)
    gradient = trained * MASTER_BYTES
    # autograd adds to whole gradients in place; only where they change dtype or are reduced are there new ones
    in_place = _accumulates(setting, s) & (setting.compute_bytes == setting.reduce_bytes)
    # a weight pass adds to gradients in the dtype in which they are reduced
    new_bytes = setting.reduce_bytes if setting.schedule == "zero_bubble" else setting.compute_bytes
    new_gradients = np.where(in_place, 0, whole * max(new_bytes, setting.compute_bytes))
    early = _early_gradient_bytes(setting, unit, s)
    new_gradients = new_gradients + np.where(in_place | (setting.compute_bytes != MASTER_BYTES), early, 0)
    flat_buffers = _gathering_elements(dense, experts, s) * setting.compute_bytes + reduced
    passing = np.where(stays, 0, gathered)
    unsharded = np.where(stays, gathered, 0) + _accumulated_bytes(setting, s, whole, gradient)
    transient = passing + flat_buffers + new_gradients + np.maximum(workspace, trained * setting.reduce_bytes)
    is_whole = (s.zero == 0) & (setting.runtime == "galvatron")
    copies = held * copied_bytes(setting) + trained * _summed_bytes(setting)
    arriving = np.maximum(trained_dense.largest, trained_experts.largest) * setting.compute_bytes
    if unit == "head" and setting.model.spec.ends == "tokens":
        arriving = _label_bytes(setting, s)  # the projection's gradient goes where it belongs as it is made
    offloads = s.offload > 0
    transient = np.maximum(np.where(is_whole, arriving + workspace, transient), offloads * slot_bytes(trained))
    return UnitMemory(
        parameter_bytes=held * MASTER_BYTES,
        gradient_bytes=gradient,
        optimizer_bytes=np.where(offloads, 0, ADAMW_STATES * trained * MASTER_BYTES),
        unsharded_bytes=np.where(is_whole, copies, unsharded) + _image_bytes(setting, unit, s),
        activation_bytes=activations,
        waiting_bytes=_waiting_bytes(setting, unit, cuts)[which],
        transient_bytes=transient,
    )


def _idle_memory(setting: Setting, s: Strategies, held: Ints) -> UnitMemory:
    """What is held and never runs; where nothing is sharded with the copy that all have."""
    nothing = np.zeros(len(s), dtype=np.int64)
    copies = np.where(s.zero == 0, held * copied_bytes(setting), 0)
    return UnitMemory(held * MASTER_BYTES, nothing, nothing, copies, nothing, nothing, nothing)


def _early_gradient_bytes(setting: Setting, unit: UnitName, s: Strategies) -> Ints:
    """The gradient of the projection to the vocabulary, summed in float32 while the loss runs forward.

    Where the model computes in float32 it becomes the gradient itself.
    """
    projections = [p for p in setting.model.spec.head.parameters[-1:] if p.trainable]
    if unit != "head" or not projections:
        return np.zeros(len(s), dtype=np.int64)
    elements = {tp: math.prod(projections[0].local_shape(tp)) for tp in set(s.tp.tolist())}
    return MASTER_BYTES * np.array([elements[tp] for tp in s.tp.tolist()], dtype=np.int64)


def bytes_in_flight(in_flight: InFlight, activation_bytes: Ints, waiting_bytes: Ints) -> Ints:
    """The most that microbatches in flight keep of what is alive and of what waits."""
    more: Ints = in_flight.turned * np.maximum(waiting_bytes - activation_bytes, 0)
    return in_flight.alive * activation_bytes + in_flight.waiting * waiting_bytes + more


def _waiting_bytes(setting: Setting, unit: UnitName, s: Strategies) -> Ints:
    """x and dy of every trained linear of a layer, for one microbatch; of a region's column-cut linears x once.

    Whole sequences: between column-cut and row-cut linears tensor-parallel ranks have them, or gather them.
    """
    matrices = [] if unit in ENDS else [p for p in setting.parameters(unit) if p.trainable and len(p.shape) == 2]
    if not matrices:
        return np.zeros(len(s), dtype=np.int64)
    kind = setting.model.spec.kind(unit)
    shared = max(len(matrices) - 2 * kind.regions, 0) * kind.hidden_size
    widths = {tp: sum(_used(p, tp) for p in matrices) - shared for tp in set(s.tp.tolist())}
    tokens = setting.micro_batch_size * setting.tokens(unit) / (s.dp * s.ulysses * s.cp)
    elements = tokens * np.array([widths[tp] for tp in s.tp.tolist()])
    waiting: Ints = np.ceil(elements * setting.compute_bytes).astype(np.int64)
    return waiting


def _used(parameter: ParameterSpec, tp: int) -> int:
    """Inputs and outputs of the part of a linear that a rank uses; of one kept whole, a block."""
    rows, columns = parameter.local_shape(tp)
    if tp > 1 and parameter.cut is not None and parameter.cut.is_whole(tp):
        rows //= parameter.cut.blocks
    return rows + columns


def _label_bytes(setting: Setting, s: Strategies) -> Ints:
    """One microbatch's labels on their device."""
    batch = setting.micro_batch_size / (s.dp * s.ulysses * s.cp)
    return np.ceil(batch * setting.tokens("head") * LABEL_BYTES).astype(np.int64)


def _image_bytes(setting: Setting, unit: UnitName, s: Strategies) -> Ints:
    """A step's images, float32, which go to a CUDA device at once; ids are too small to count."""
    patches = [math.prod(p.shape[1:]) for p in setting.parameters(unit) if unit == "embedding" and len(p.shape) == 4]
    if setting.hardware.device.type != "cuda" or not patches:
        return np.zeros(len(s), dtype=np.int64)
    images = setting.global_batch_size / (s.dp * s.ulysses * s.cp)
    return np.ceil(images * setting.tokens(unit) * sum(patches) * MASTER_BYTES).astype(np.int64)


def copied_bytes(setting: Setting) -> int:
    """Bytes of a parameter's copy beside the float32 one, where nothing is sharded."""
    return setting.compute_bytes if setting.compute_bytes != MASTER_BYTES else 0


def _summed_bytes(setting: Setting) -> int:
    """Bytes of a gradient's copy for the sum over replicas: the parameter's copy serves where it has that dtype."""
    return setting.reduce_bytes if setting.reduce_bytes not in (MASTER_BYTES, setting.compute_bytes) else 0


def _gathering_elements(dense: ShardSize, experts: ShardSize, s: Strategies) -> Ints:
    """Elements of the flat buffers of all-gathers: of what is sharded at all."""
    return dense.held * s.shard * (s.shard > 1) + experts.held * s.expert_shard * (s.expert_shard > 1)


def _passing_bytes(setting: Setting, unit: UnitName, s: Strategies, layers: range | None) -> tuple[Ints, Ints]:
    """(what one microbatch leaves behind, what its own passes need beyond that).

    Ulysses and ring ranks hold 1 / degree of a batch's activations: tokens in linears, heads or blocks in attention.
    Ulysses keeps attention's output before and after its exchange, and keys and values as often as they travel.
    """
    batch = setting.micro_batch_size / (s.dp * s.ulysses * s.cp)
    activations, workspace, dropped = np.zeros(len(s)), np.zeros(len(s)), 1 - kept(setting, unit, s).asked
    for tp, recompute in sorted({*zip(s.tp.tolist(), s.recompute.tolist(), strict=True)}):
        rows = np.flatnonzero((s.tp == tp) & (s.recompute == recompute))
        sample = setting.activation_sample(unit, tp, RECOMPUTES[recompute], layers)
        each = sample.bytes_per_sequence - dropped[rows] * sample.expert_bytes_per_sequence
        activations[rows] = sample.fixed_bytes + batch[rows] * each
        workspace[rows] = sample.workspace_bytes(batch[rows])
    if unit not in ENDS:
        kept_more = _dealt_bytes(setting, unit, s, batch) + _index_bytes(setting, unit, s, batch)
        activations = activations + np.where(s.recompute == NONE, kept_more, 0.0)
        workspace = workspace + _exchange_bytes(setting, unit, s, batch) + np.where(s.recompute == NONE, 0.0, kept_more)
    if not setting.model.spec.is_reached(unit):
        workspace = workspace + REDISTRIBUTED_TENSORS * setting.entering_bytes(unit)
    if setting.fills(unit):  # chunks are joined with what fills them up, then copied without it
        workspace = workspace + setting.entering_bytes(unit)
    return np.ceil(activations).astype(np.int64), np.ceil(workspace).astype(np.int64)


def _dealt_bytes(setting: Setting, unit: UnitName, s: Strategies, batch: Floats) -> Floats:
    """What a layer's attention keeps more under Ulysses: its output twice, copies of keys and values."""
    kind = setting.model.spec.kind(unit)
    head_bytes = batch * setting.tokens(unit) * kind.head_dim * setting.compute_bytes
    kv_heads = np.maximum(kind.num_kv_heads / s.tp, 1.0)
    copies = dealt_kv_heads(kind, s) - kv_heads
    more: Floats = (s.ulysses > 1) * head_bytes * (kind.num_heads / s.tp + 2 * copies)
    return more


def _index_bytes(setting: Setting, unit: UnitName, s: Strategies, batch: Floats) -> Floats:
    """Which tokens a rank has sent and got, and which of these is for which expert; also where some may be for none."""
    kind, asked = setting.model.spec.kind(unit), kept(setting, unit, s).asked
    tokens, chosen = batch * setting.tokens(unit), (s.ep > 1) | (setting.model.capacity_factor is not None)
    rows = (s.ep > 1) * expert_ranks(kind, s) if kind.num_experts else np.zeros(len(s))
    return 2 * INDEX_BYTES * tokens * asked * (rows + chosen * kind.experts_per_token)


def _exchange_bytes(setting: Setting, unit: UnitName, s: Strategies, batch: Floats) -> Floats:
    """Buffers of the widest exchange of a layer: Ulysses' q, k and v, what a ring holds, or the tokens sent to experts.

    A ring's backward holds keys and values twice and their float32 gradients four times: those of the rank itself,
    those just made, what is leaving and what comes; and the float32 gradient of the queries beside that of a block.
    """
    kind = setting.model.spec.kind(unit)
    token_bytes = batch * setting.tokens(unit) * setting.compute_bytes
    heads, exchanged = kind.num_heads / s.tp, dealt_kv_heads(kind, s)
    ulysses = (s.ulysses > 1) * token_bytes * kind.head_dim * (heads + 2 * exchanged)
    wide = MASTER_BYTES / setting.compute_bytes
    ring = (s.cp > 1) * token_bytes * kind.head_dim * ((1 + wide) * heads + (4 + 8 * wide) * exchanged)
    experts = (s.ep > 1) * token_bytes * expert_ranks(kind, s) * kind.hidden_size
    widest: Floats = np.maximum(np.maximum(ulysses, ring), experts)
    return widest


def stays_gathered(setting: Setting, unit: UnitName, s: Strategies) -> NDArray[np.bool_]:
    """Whether gathered parameters stay through the step: always below ZeRO 3, and in a group tied to the head.

    The tied group's backward begins where its forward ends, so it is sharded again for no time at all.
    """
    stays: NDArray[np.bool_] = (s.zero != 3) | (unit == "embedding" and setting.shares_tied_weight)
    return stays


def _accumulates(setting: Setting, s: Strategies) -> NDArray[np.bool_]:
    """Whether whole gradients wait for the last microbatch."""
    waits: NDArray[np.bool_] = ((s.zero < 2) | setting.reduces_once) & (setting.num_microbatches > 1)
    return waits


def _accumulated_bytes(setting: Setting, s: Strategies, whole: Ints, gradient_bytes: Ints) -> Ints:
    """Whole gradients kept between microbatches, beyond the reduced gradient that takes their place at the end."""
    waiting = np.maximum(whole * setting.reduce_bytes - gradient_bytes, 0)
    return np.where(_accumulates(setting, s), waiting, 0)


def shared_bytes(setting: Setting) -> int:
    """What one microbatch in flight keeps on every stage but the first: its own of what all layers share.

    The profile counts it with the embedding.
    """
    return setting.fixed_bytes("embedding")


def tables_share(layers: Iterable[LayerStrategy]) -> float:
    """Which part of that some layers keep, whose ranks see a part of the positions each (``OwnPlaces``).

    Where all see the same part there is no other; else all positions, and the parts taken out of them.
    """
    seen = {(strategy.tp, strategy.ulysses * strategy.cp) for strategy in layers}
    if len(seen) == 1:
        return 1 / seen.pop()[1]
    return 1 + sum(1 / cut for _, cut in seen if cut > 1)
