"""Attention by a ring against attention in one piece, in float64: outputs and gradients, whatever the layout."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from galvatron.parallelize.layers.ring import ring_attention
from galvatron.parallelize.processes.collectives import AxisGroup, of_spans
from galvatron.plan.axes import StageAxes
from galvatron.testing.pool import Pool

ROWS, HEADS, KV_HEADS, HEAD_DIM, TOKENS = 2, 4, 2, 6, 48


def reference(heads: list[torch.Tensor], sinks: torch.Tensor | None, causal: bool, window: int | None) -> torch.Tensor:
    query, key, value = heads
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)[None, :]
    hidden = (
        (distance < 0) | (distance >= (window or TOKENS)) if causal else torch.zeros_like(distance, dtype=torch.bool)
    )
    key, value = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (key, value))
    scores = (query @ key.transpose(-1, -2) / HEAD_DIM**0.5).masked_fill(hidden, -torch.inf)
    if sinks is None:
        return scores.softmax(dim=-1) @ value
    beside = sinks[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, beside), dim=-1).softmax(dim=-1)[..., :-1] @ value


def largest_errors(gathered: int, causal: bool, window: int | None, has_sinks: bool) -> list[float]:
    """Of the output and all gradients, on this rank; ``gathered`` chunks were, beforehand."""
    rank, world_size, folded = dist.get_rank(), dist.get_world_size(), causal
    generator = torch.Generator().manual_seed(0)
    numbers = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    sizes = (HEAD_DIM, HEAD_DIM, *((HEAD_DIM - has_sinks,) * 2))  # latent attention's values are narrower
    *heads, grad = (
        torch.randn(ROWS, n, TOKENS, size, generator=generator, dtype=torch.float64, requires_grad=True)
        for n, size in zip(numbers, sizes, strict=True)
    )
    sinks = torch.randn(HEADS, generator=generator, dtype=torch.float64, requires_grad=True) if has_sinks else None
    whole = reference(heads, sinks, causal, window)
    whole.backward(grad)
    # a stage in which each rank of the ring stands for ``gathered`` ranks whose chunks it has
    axes = StageAxes(gathered * world_size)
    spans = axes.spans(rank * gathered, gathered, gathered * world_size, TOKENS, folded=folded)
    ring = AxisGroup(dist.group.WORLD, axes.axes_between(gathered, gathered * world_size), rank, gathered, folded)

    def own(tensor: torch.Tensor | None) -> torch.Tensor:
        assert tensor is not None
        return of_spans(tensor.detach().transpose(2, 3), spans).transpose(2, 3)

    local = [own(tensor).contiguous().requires_grad_() for tensor in heads]
    own_sinks = None if sinks is None else sinks.detach().clone().requires_grad_()
    out = ring_attention(*local, ring, None, window, causal=causal, sinks_N=own_sinks)
    out.backward(own(grad))
    pairs = [(out, own(whole)), *((part.grad, own(tensor.grad)) for part, tensor in zip(local, heads, strict=True))]
    if own_sinks is not None and sinks is not None and own_sinks.grad is not None:
        dist.all_reduce(own_sinks.grad)
        pairs.append((own_sinks.grad, sinks.grad))
    return [float((ours - theirs).detach().abs().max()) for ours, theirs in pairs if ours is not None]


@pytest.mark.parametrize(
    ("causal", "window", "has_sinks"),
    [
        (True, None, False),
        (True, None, True),
        (True, 1, False),
        (True, 5, True),
        (True, 30, False),
        (False, None, True),
    ],
    ids=str,
)
@pytest.mark.parametrize(("world_size", "gathered"), [(1, 1), (2, 1), (2, 4), (3, 1), (4, 1), (4, 2)])
def test_a_ring_attends_as_one_rank_does(
    pool: Pool, world_size: int, gathered: int, causal: bool, window: int | None, has_sinks: bool
) -> None:
    for errors in pool.run(largest_errors, gathered, causal, window, has_sinks, world_size=world_size):
        assert errors == pytest.approx([0.0] * (4 + has_sinks), abs=1e-12)
