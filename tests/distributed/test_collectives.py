"""Sequence and batch collectives: what arrives where, and that backward is the exact adjoint."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from galvatron.parallelize.processes.collectives import (
    AxisGroup,
    batch_to_sequence,
    gather_sequence,
    reduce_scatter_sequence,
    sequence_to_batch,
)
from galvatron.plan.axes import StageAxes
from galvatron.testing.pool import Pool

BATCH, SEQUENCE = 24, 24


def cells(axes: StageAxes, rank: int, degree: int) -> torch.Tensor:
    """The (batch, sequence) cells, numbered, that a rank holds under a sequence degree."""
    grid = torch.arange(BATCH * SEQUENCE, dtype=torch.float32).view(BATCH, SEQUENCE)
    rows = grid.chunk(axes.num_devices // degree)[axes.batch_chunk(rank, degree)]
    return rows.chunk(degree, dim=1)[axes.sequence_chunk(rank, degree)].contiguous()


def check_layouts(world_size: int) -> int:
    rank, axes, checked = dist.get_rank(), StageAxes(world_size), 0
    groups = {}
    for inner in axes.degrees:
        for outer in (d for d in axes.degrees if d > inner):
            for ranks in axes.groups(inner, outer):
                group = dist.new_group(list(ranks))
                if rank in ranks:
                    groups[inner, outer] = AxisGroup(group, axes.axes_between(inner, outer), ranks.index(rank))
    for (inner, outer), group in groups.items():
        assert torch.equal(batch_to_sequence(cells(axes, rank, inner), group), cells(axes, rank, outer))
        assert torch.equal(sequence_to_batch(cells(axes, rank, outer), group), cells(axes, rank, inner))
        if inner == 1:  # gathering the whole sequence of my rows
            rows = axes.batch_chunk(rank, outer)
            whole = torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE).chunk(world_size // outer)[rows].float()
            assert torch.equal(gather_sequence(cells(axes, rank, outer), group), whole)
            share = reduce_scatter_sequence(whole, group) / group.size
            assert torch.equal(share, cells(axes, rank, outer))
        checked += 1
    return checked


@pytest.mark.parametrize(("world_size", "pairs"), [(2, 1), (4, 3), (6, 3), (8, 6)])
def test_layouts_change_as_the_axes_say(pool: Pool, world_size: int, pairs: int) -> None:
    assert pool.run(check_layouts, world_size, world_size=world_size) == [pairs] * world_size


def check_adjoint(world_size: int) -> list[float]:
    """<A x, y> - <x, Aᵀ y> over all ranks, for every map."""
    axes = StageAxes(world_size)
    group = AxisGroup(dist.group.WORLD, axes.axes_between(1, world_size), dist.get_rank())
    maps: list[Callable[[torch.Tensor, AxisGroup], torch.Tensor]]
    maps = [gather_sequence, reduce_scatter_sequence, batch_to_sequence, sequence_to_batch]
    gaps = []
    torch.manual_seed(dist.get_rank())
    for function in maps:
        x = torch.randn(2 * world_size, 3 * world_size, 5, dtype=torch.float64, requires_grad=True)
        image = function(x, group)
        y = torch.randn_like(image)
        image.backward(y)
        assert x.grad is not None
        products = torch.stack([(image * y).sum(), (x * x.grad).sum()]).detach()
        dist.all_reduce(products)
        gaps.append(float(products[0] - products[1]))
    return gaps


@pytest.mark.parametrize("world_size", [2, 4, 6])
def test_backward_is_the_adjoint(pool: Pool, world_size: int) -> None:
    for gaps in pool.run(check_adjoint, world_size, world_size=world_size):
        assert gaps == pytest.approx([0.0] * 4, abs=1e-9)
