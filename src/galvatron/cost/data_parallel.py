"""Seconds of what data parallelism gathers and sums, of one unit under many strategies at once.

Takes a Setting, a unit, strategies and its sizes; gives seconds a microbatch and a step.  Knows nothing of what else a
unit takes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from galvatron.core.hardware import Op
from galvatron.core.model import ENDS, UnitName

from .communication import collective_s, exposed_s, tied_reduction_s
from .memory import MASTER_BYTES
from .setting import Setting
from .sizes import ShardSize, held_and_trained, shard_sizes
from .strategies import Floats, Ints, Strategies


def messages_s(
    setting: Setting,
    unit: UnitName,
    s: Strategies,
    held: tuple[ShardSize, ShardSize],
    trained: tuple[ShardSize, ShardSize],
) -> tuple[Floats, Floats, Floats, Floats]:
    """(gather, scatter, sum over replicas, of the scatter what arrives last) of all that a unit has.

    All that is ``held`` (dense, experts) is gathered, what is ``trained`` of it is reduced.  A head in one group with
    the embedding adds bytes to the messages of that, as experts do to their layer's where they are not dealt out.
    """
    joins = unit == "head" and setting.shares_tied_weight
    # replicas add up over microbatches what they reduce, zeros where nothing is
    late = held_and_trained(setting.arriving_last(unit), s)[1][0].held * setting.reduce_bytes * (s.replicas == 1)

    def message_s(op: Op, size: Ints, stride: Ints, num_bytes: Ints, is_added: NDArray[np.bool_] | bool) -> Floats:
        return collective_s(setting, op, size, stride, num_bytes) - is_added * collective_s(
            setting, op, size, stride, 0
        )

    gather_s = scatter_s = replicate_s = np.zeros(len(s))
    groups = (
        (s.shard, s.replicas, s.tp, joins),
        (s.expert_shard, s.expert_replicas, s.tp * s.ep, s.ep == 1),
    )
    for size, of_trained, (shard, replicas, inner, is_added) in zip(held, trained, groups, strict=True):
        if size.held.any():
            padded = size.held * shard * setting.compute_bytes
            gather_s = gather_s + message_s("all_gather", shard, inner, padded, is_added)
        if of_trained.held.any():
            reduced = of_trained.held * setting.reduce_bytes
            scatter_s = scatter_s + message_s("reduce_scatter", shard, inner, reduced * shard, is_added)
            replicate_s = replicate_s + message_s("all_reduce", replicas, inner * shard, reduced, is_added)
    return gather_s, scatter_s, replicate_s, late * s.shard * setting.links("reduce_scatter", s.shard, s.tp)[1]


def data_parallel_s(
    setting: Setting,
    unit: UnitName,
    s: Strategies,
    messages: tuple[Floats, Floats, Floats, Floats],
    forward_s: Floats,
    backward_s: Floats,
    layers: range | None = None,
) -> tuple[Floats, ...]:
    """Exposed (forward, backward) per microbatch, then what ``UnitTimes`` has once a step, from ``first_s`` on.

    ``messages``: what ``messages_s`` gives; under ZeRO 3 gathers come perhaps again for the backward.
    """
    gather_s, scatter_s, replicate_s, late_s = messages
    twice = setting.model.spec.is_reached(unit) and setting.gathers_twice(unit, layers)
    every_gather_s = np.where(s.zero == 3, gather_s, 0.0)
    # under ZeRO 2 and 3 FSDP2 reduces within the backward, replicas at its last; under ZeRO 1 a stage that sends back
    # reduces after its message; without ZeRO reductions run beside the backward and hold up nothing
    within = (s.zero >= 2) & (not setting.reduces_once)
    every_scatter_s = np.where(within, scatter_s - late_s, 0.0)
    once_gather_s = gather_s - every_gather_s
    once_scatter_s = np.where(within, late_s, scatter_s) + replicate_s
    forward = exposed_s(setting, forward_s, every_gather_s)
    again_s = twice * every_gather_s
    backward = exposed_s(setting, backward_s, again_s + every_scatter_s)
    first = exposed_s(setting, forward_s, every_gather_s + once_gather_s) - forward
    last = exposed_s(setting, backward_s, again_s + every_scatter_s + once_scatter_s) - backward
    after = np.where((s.zero == 1) | setting.reduces_once, once_scatter_s, last)
    return (
        forward,
        backward,
        first,
        once_gather_s,
        np.where(within, 0.0, last),
        np.where(within, 0.0, after),
        np.where(within, last, 0.0),
    )


def replicated_bytes_s(setting: Setting, s: Strategies, dense: ShardSize, experts: ShardSize) -> Floats:
    """The unit's part of the one all-reduce a step that sums uncut gradients over tp: its bytes, not its latency.

    The latency comes once for all units of a stage; ``step`` adds it.
    """
    _, seconds_per_byte = setting.links("all_reduce", s.tp, np.ones_like(s.tp))
    return (dense.uncut + experts.uncut) * MASTER_BYTES * seconds_per_byte


def tied_s(setting: Setting, unit: UnitName, s: Strategies) -> Floats:
    """The sum of the tied weight's gradient over first and last stage; 0 where there is one copy."""
    if not setting.copies_tied_weight or unit not in ENDS:
        return np.zeros(len(s))
    spec = setting.model.spec
    tied = [p for p in setting.parameters(unit) if p.shape == (spec.vocab_size, spec.hidden_size) and p.trainable]
    return tied_reduction_s(setting, shard_sizes(tied, s)[0].held * MASTER_BYTES) if tied else np.zeros(len(s))
