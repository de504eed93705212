"""How many elements of a unit the fullest rank holds, cut by tp, ep and ZeRO.

Takes parameters and strategies; gives elements.  Knows nothing of bytes or seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from galvatron.core.model import LayerKind, ParameterSpec, shard_dim

from .strategies import Floats, Ints, Strategies


@dataclass(frozen=True, slots=True)
class ShardSize:
    """Elements of one unit on the fullest rank, one row a strategy.

    ``held``: its shard, padding included; ``whole``: after the cut by tp (and ep), before sharding; ``largest``: of
    that, the largest parameter; ``uncut``: the part of ``held`` that every tp rank has too.
    """

    held: Ints
    whole: Ints
    largest: Ints
    uncut: Ints


def shard_sizes(parameters: Iterable[ParameterSpec], strategies: Strategies) -> tuple[ShardSize, ShardSize]:
    """Sums over ``parameters`` of what rank 0, the fullest, holds of each: of all but experts, and of experts.

    FSDP2 shards by rows of a dim (``core.model.shard_dim``).
    """
    listed = list(parameters)
    dense = _sizes([p for p in listed if not p.experts], strategies.tp, np.ones_like(strategies.ep), strategies.shard)
    experts = [p for p in listed if p.experts]
    return dense, _sizes(experts, strategies.tp, strategies.ep, strategies.expert_shard)


def dealt_kv_heads(kind: LayerKind, strategies: Strategies) -> Floats:
    """Key heads that a tp rank hands to its Ulysses ranks: where they are fewer than these, one copy each."""
    own: Floats = np.maximum(kind.num_kv_heads / strategies.tp, 1.0)
    return np.maximum(own, strategies.ulysses)


def expert_ranks(kind: LayerKind, strategies: Strategies) -> Floats:
    """How many of the ranks that experts are dealt to a token goes to, on average, if all experts are equally likely.

    A rank is left out where none of the token's experts is among its own: drawn without putting back.
    """
    chosen, elsewhere = np.arange(kind.experts_per_token), kind.num_experts - kind.num_experts // strategies.ep
    left_out = np.maximum(elsewhere[:, None] - chosen, 0) / (kind.num_experts - chosen)
    ranks: Floats = strategies.ep * (1 - left_out.prod(axis=1))
    return ranks


def trained_sizes(parameters: Iterable[ParameterSpec], strategies: Strategies) -> tuple[ShardSize, ShardSize]:
    """The same of what is trainable alone: what has gradients and optimizer states."""
    return shard_sizes((p for p in parameters if p.trainable), strategies)


def _sizes(parameters: list[ParameterSpec], tp: Ints, ep: Ints, shard: Ints) -> ShardSize:
    held, whole, largest, uncut = (np.zeros(len(tp), dtype=np.int64) for _ in range(4))
    for t, e in sorted({*zip(tp.tolist(), ep.tolist(), strict=True)}) if parameters else ():
        rows = np.flatnonzero((tp == t) & (ep == e))
        for parameter in parameters:
            shape = parameter.local_shape(t, ep=e)
            elements = math.prod(shape)
            parts, places = np.unique(shard[rows], return_inverse=True)
            part = np.array([_sharded(shape, n) for n in parts.tolist()])[places]
            held[rows] += part
            whole[rows] += elements
            largest[rows] = np.maximum(largest[rows], elements)
            if parameter.cut is None or parameter.cut.is_whole(t):
                uncut[rows] += part
    return ShardSize(held, whole, largest, uncut)


def _sharded(shape: tuple[int, ...], num_shards: int) -> int:
    """Elements of the first shard, the largest."""
    length = shape[shard_dim(shape, num_shards)]
    return -(-length // num_shards) * (math.prod(shape) // length)
