"""Ulysses: around attention, chunks of the sequence with all heads become the whole sequence with some heads.

One all-to-all brings queries, keys and values, one takes the output back (Jacobs et al. 2023).  Where there are fewer
key/value heads than ranks, each goes to all ranks whose query heads need it, and autograd sums what comes back.

B rows, S local tokens, k ranks, N query and K key/value heads of this rank's tensor-parallel part, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..processes.collectives import AxisGroup, exchange, join, split


def deal_heads(
    query_BSND: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, axes: AxisGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """→ [B, k·S, N/k, D] and twice [B, k·S, max(K/k, 1), D]: this rank's heads of all the ranks' tokens."""
    if axes.size == 1:
        return query_BSND, key_BSKD, value_BSKD
    if query_BSND.shape[1] != key_BSKD.shape[1]:  # another stack's
        (query,), (key, value) = _deal(axes, query_BSND), _deal(axes, key_BSKD, value_BSKD)
    else:
        query, key, value = _deal(axes, query_BSND, key_BSKD, value_BSKD)
    return query, key, value


def collect_heads(output_BSND: Tensor, axes: AxisGroup) -> Tensor:
    """[B, k·S, N/k, D] → [B, S, N, D]: all heads of this rank's own tokens."""
    if axes.size == 1:
        return output_BSND
    return exchange(split(output_BSND, axes), axes).movedim(0, 2).flatten(2, 3)


def own_sinks(sinks_N: Tensor | None, axes: AxisGroup) -> Tensor | None:
    """[N] → [N/k]: those of the query heads that this rank attends with."""
    return sinks_N if sinks_N is None or axes.size == 1 else sinks_N.chunk(axes.size)[axes.rank]


def _deal(axes: AxisGroup, *heads: Tensor) -> list[Tensor]:
    """Of as many tokens each, by one all-to-all."""
    dealt = [_dealt(tensor, axes.size) for tensor in heads]
    joined = join(exchange(torch.cat(dealt, dim=-1), axes), axes)
    parts = joined.split([part.shape[-1] for part in dealt], dim=-1)
    return [part.unflatten(-1, (-1, tensor.shape[-1])) for part, tensor in zip(parts, heads, strict=True)]


def _dealt(heads_BSND: Tensor, ranks: int) -> Tensor:
    """[B, S, N, D] → [k, B, S, elements]: the heads of rank g in entry g."""
    num_heads = heads_BSND.shape[2]
    if num_heads % ranks:
        heads_BSND = heads_BSND.repeat_interleave(ranks // num_heads, dim=2)
    return heads_BSND.unflatten(2, (ranks, -1)).movedim(2, 0).flatten(3)
