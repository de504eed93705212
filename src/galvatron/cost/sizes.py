"""How many elements of a unit the fullest rank holds, cut by tp, ep and ZeRO.

Takes parameters and strategies; gives elements.  Knows nothing of bytes or seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from galvatron.core.model import LayerKind, ParameterSpec, shard_dim

from .strategies import Floats, Ints, Strategies


@dataclass(frozen=True, slots=True)
class ShardSize:
    """Elements of one unit on the fullest rank, one row a strategy.

    ``held``: its shard, padding included; ``whole``: after the cut by tp (and ep), before sharding; ``largest``: of
    that, the largest parameter; ``uncut``: the part of ``held`` that other tp ranks have too.
    """

    held: Ints
    whole: Ints
    largest: Ints
    uncut: Ints

    def take(self, at: Ints) -> ShardSize:
        """Some rows."""
        return ShardSize(self.held[at], self.whole[at], self.largest[at], self.uncut[at])


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


def held_and_trained(
    parameters: Sequence[ParameterSpec], strategies: Strategies
) -> tuple[tuple[ShardSize, ShardSize], tuple[ShardSize, ShardSize]]:
    """``shard_sizes``, and the same of what is trainable alone: what has gradients and optimizer states."""
    held, trained = shard_sizes(parameters, strategies), [p for p in parameters if p.trainable]
    return held, held if len(trained) == len(parameters) else shard_sizes(trained, strategies)


def _sizes(parameters: list[ParameterSpec], tp: Ints, ep: Ints, shard: Ints) -> ShardSize:
    """Thousands of strategies share a few cuts, and a search asks for them at every batch."""
    if not parameters:
        return ShardSize(*np.zeros((4, len(tp)), dtype=np.int64))
    _, first, at = np.unique((tp << 42) + (ep << 21) + shard, return_index=True, return_inverse=True)
    of = _elements(tuple(parameters))
    cuts = [of(*cut) for cut in zip(tp[first].tolist(), ep[first].tolist(), shard[first].tolist(), strict=True)]
    return ShardSize(*np.array(cuts, dtype=np.int64).reshape(-1, 4)[at].T)


@cache
def _elements(parameters: tuple[ParameterSpec, ...]) -> Callable[[int, int, int], tuple[int, int, int, int]]:
    """What ``ShardSize`` has of all parameters, by (tp, ep, shards)."""

    @cache
    def of(tp: int, ep: int, num_shards: int) -> tuple[int, int, int, int]:
        shapes = [parameter.local_shape(tp, ep=ep) for parameter in parameters]
        parts, whole = [_sharded(shape, num_shards) for shape in shapes], [math.prod(shape) for shape in shapes]
        uncut = sum(_common(p, part, tp) for p, part in zip(parameters, parts, strict=True))
        return sum(parts), sum(whole), max(whole), uncut

    return of


def _common(parameter: ParameterSpec, held: int, tp: int) -> int:
    """Of ``held`` elements of a parameter those that other tp ranks hold too."""
    cut = parameter.cut
    if cut is None or cut.is_whole(tp):
        return held
    runs = [stop - start for start, stop in cut.ranges(parameter.shape[cut.dim], tp, 0)]
    return held * sum(run for run, copies in zip(runs, cut.copies(tp), strict=True) if copies > 1) // sum(runs)


def _sharded(shape: tuple[int, ...], num_shards: int) -> int:
    """Elements of the first shard, the largest."""
    length = shape[shard_dim(shape, num_shards)] if shape else 1  # a number is whole on every rank
    return -(-length // num_shards) * (math.prod(shape) // length)
