"""Groups of large plans, on PyTorch's fake process group: any rank of a thousand in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from galvatron.parallelize import Grid, World
from galvatron.plan import LayerStrategy, Plan

ENDS = LayerStrategy(tp=8, dp_shard=64, zero=3)
LAYERS = (
    LayerStrategy(tp=4, dp_shard=8, dp_replicate=16, zero=2),
    LayerStrategy(dp_shard=512, zero=3),
    LayerStrategy(tp=8, dp_replicate=64),
    LayerStrategy(dp_shard=64, dp_replicate=8, zero=1),
)
PLAN = Plan(
    model="large",
    world_size=1024,
    layers_per_stage=(2, 2),
    global_batch_size=1024,
    seq_len=4096,
    embedding=ENDS,
    head=ENDS,
    layers=LAYERS,
)


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[World]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield World(rank, world_size, 0, torch.device("cpu"), "gloo")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 511, 512, 777, 1023])
def test_a_thousand_ranks_need_a_dozen_groups(rank: int) -> None:
    with fake_world(rank, 1024) as world:
        grid = Grid(PLAN, world, copied={(None, "table"): (0, PLAN.pp - 1)})
        assert len(world._groups) <= 14
        assert (grid.stage, grid.stage_rank) == divmod(rank, 512)
        assert dist.get_process_group_ranks((grid.before or grid.after).forward) == [rank % 512, rank % 512 + 512]
        for strategy in LAYERS:
            ranks = data_parallel_ranks(grid, strategy)
            assert len(ranks) == strategy.dp
            assert rank in ranks
            # they hold the same sequence chunk of different rows
            assert len({grid.axes.sequence_chunk(r % 512, strategy.sequence_degree) for r in ranks}) == 1


def data_parallel_ranks(grid: Grid, strategy: LayerStrategy) -> list[int]:
    if strategy.zero:
        return grid.mesh(strategy).mesh.flatten().tolist()
    replicas = grid.replicas(strategy)
    assert replicas is not None
    return dist.get_process_group_ranks(replicas)


def test_groups_are_made_once_and_shared_between_plans() -> None:
    with fake_world(5, 1024) as world:
        Grid(PLAN, world)
        before = len(world._groups)
        Grid(PLAN, world)
        assert len(world._groups) == before


def test_the_inner_mesh_dim_shards_and_the_outer_replicates() -> None:
    with fake_world(0, 1024) as world:
        mesh = Grid(PLAN, world).mesh(LAYERS[0])
        assert mesh.mesh_dim_names == ("dp_replicate", "dp_shard")
        assert mesh.mesh[0].tolist() == list(range(0, 32, 4))
        assert mesh.mesh[:, 0].tolist() == list(range(0, 512, 32))
