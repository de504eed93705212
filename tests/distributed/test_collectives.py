"""Sequence and batch collectives: what arrives where, and that backward is the exact adjoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from galvatron.parallelize.layers.ulysses import collect_heads, deal_heads
from galvatron.parallelize.processes.collectives import (
    AxisGroup,
    batch_to_sequence,
    gather_sequence,
    of_spans,
    reduce_scatter_sequence,
    sequence_to_batch,
)
from galvatron.parallelize.processes.rows import Traffic, gather_rows, reduce_scatter_rows, send_rows
from galvatron.plan.axes import StageAxes
from galvatron.testing.pool import Pool

BATCH, SEQUENCE = 24, 48


def cells(axes: StageAxes, rank: int, degree: int, folded: bool, gathered: int = 1) -> torch.Tensor:
    """The (batch, sequence) cells, numbered, that a rank holds under a sequence degree, with those gathered."""
    grid = torch.arange(BATCH * SEQUENCE, dtype=torch.float32).view(BATCH, SEQUENCE)
    rows = grid.chunk(axes.num_devices // degree)[axes.batch_chunk(rank, degree)]
    return of_spans(rows, axes.spans(rank, gathered, degree, SEQUENCE, folded=folded)).contiguous()


def check_layouts(world_size: int, folded: bool) -> int:
    rank, axes, checked = dist.get_rank(), StageAxes(world_size), 0
    groups = {}
    for inner in axes.degrees:
        for outer in (d for d in axes.degrees if d > inner):
            for ranks in axes.groups(inner, outer):
                group = dist.new_group(list(ranks))
                if rank in ranks:
                    sizes = axes.axes_between(inner, outer)
                    groups[inner, outer] = AxisGroup(group, sizes, ranks.index(rank), folded=folded)
    for (inner, outer), group in groups.items():
        before, after = cells(axes, rank, inner, folded), cells(axes, rank, outer, folded)
        assert torch.equal(batch_to_sequence(before, group), after)
        assert torch.equal(sequence_to_batch(after, group), before)
        for degree in (d for d in axes.degrees if d >= outer):  # outer axes may go on cutting what is gathered
            mine, seen = (cells(axes, rank, degree, folded, gathered) for gathered in (inner, outer))
            own = dataclasses.replace(group, pieces=inner)
            assert torch.equal(gather_sequence(mine, own), seen)
            assert torch.equal(reduce_scatter_sequence(seen, own) / group.size, mine)
        checked += 1
    return checked


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("world_size", "pairs"), [(2, 1), (4, 3), (6, 3), (8, 6)])
def test_layouts_change_as_the_axes_say(pool: Pool, world_size: int, pairs: int, folded: bool) -> None:
    assert pool.run(check_layouts, world_size, folded, world_size=world_size) == [pairs] * world_size


def heads_and_back(x: torch.Tensor, group: AxisGroup) -> torch.Tensor:
    """Queries of 2k heads, keys and values of one; the output is of queries, with what is copied added in."""
    query, key, value = deal_heads(x.unsqueeze(-1), x[..., :1].unsqueeze(-1), x[..., 1:2].unsqueeze(-1), group)
    return collect_heads(query * (1 + dist.get_rank(group.group)) + key - 2 * value, group)


def check_adjoint(world_size: int, folded: bool) -> list[float]:
    """<A x, y> - <x, Aᵀ y> over all ranks, for every map."""
    axes = StageAxes(world_size)
    group = AxisGroup(dist.group.WORLD, axes.axes_between(1, world_size), dist.get_rank(), folded=folded)
    maps: list[Callable[[torch.Tensor, AxisGroup], torch.Tensor]]
    maps = [gather_sequence, reduce_scatter_sequence, batch_to_sequence, sequence_to_batch, heads_and_back]
    maps += [gather_rows, reduce_scatter_rows]
    gaps = []
    torch.manual_seed(dist.get_rank())
    for function in maps:
        x = torch.randn(2 * world_size, 6 * world_size, 2 * world_size, dtype=torch.float64, requires_grad=True)
        image = function(x, group)
        y = torch.randn_like(image)
        image.backward(y)
        assert x.grad is not None
        products = torch.stack([(image * y).sum(), (x * x.grad).sum()]).detach()
        dist.all_reduce(products)
        gaps.append(float(products[0] - products[1]))
    return gaps


def check_rows_sent() -> tuple[float, bool]:
    """<A x, y> - <x, Aᵀ y> of rows that go to other ranks, unevenly; and whether they came home."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    table = [[(a * b + a) % 3 for b in range(world_size)] for a in range(world_size)]  # rank 0 sends nothing
    traffic = Traffic(tuple(table[rank]), tuple(row[rank] for row in table))
    group = AxisGroup(dist.group.WORLD, (world_size,), rank)
    torch.manual_seed(rank)
    x, z = torch.randn(sum(traffic.sent), 5, requires_grad=True), torch.randn(sum(traffic.sent), 2).bfloat16()
    image, halves = send_rows((x, z), traffic, group)
    y = torch.randn_like(image)
    image.backward(y)
    assert x.grad is not None
    products = torch.stack([(image * y).sum(), (x * x.grad).sum()]).detach()
    dist.all_reduce(products)
    home = send_rows((image, halves), traffic.back, group)
    return float(products[0] - products[1]), torch.equal(home[0], x) and torch.equal(home[1], z)


@pytest.mark.parametrize("world_size", [2, 4])
def test_rows_of_any_number_go_where_they_are_sent_and_back(pool: Pool, world_size: int) -> None:
    for gap, came_home in pool.run(check_rows_sent, world_size=world_size):
        assert gap == pytest.approx(0.0, abs=1e-4)
        assert came_home


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("world_size", [2, 4, 6])
def test_backward_is_the_adjoint(pool: Pool, world_size: int, folded: bool) -> None:
    for gaps in pool.run(check_adjoint, world_size, folded, world_size=world_size):
        assert gaps == pytest.approx([0.0] * 7, abs=1e-9)
