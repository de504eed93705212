"""Pieces of all ranks tile every parameter, whatever the two cuts."""

from __future__ import annotations

import pytest
import torch

from galvatron.core.model import Cut, ParameterSpec
from galvatron.parallelize.state.pieces import box, pieces_of, shard_rows

SPECS = (
    ParameterSpec(name="norm", shape=(7,)),
    ParameterSpec(name="column", shape=(12, 5), cut=Cut(dim=0, segments=(4,))),
    ParameterSpec(name="row", shape=(5, 12), cut=Cut(dim=1, segments=(4,))),
    ParameterSpec(name="fused", shape=(5, 36), cut=Cut(dim=1, segments=(4, 4, 4))),
    ParameterSpec(name="fused bias", shape=(36,), cut=Cut(dim=0, segments=(4, 4, 4))),
    ParameterSpec(name="fused, fewer keys and values", shape=(5, 32), cut=Cut(dim=1, segments=(8, 4, 4))),
    ParameterSpec(name="kv", shape=(6, 5), cut=Cut(dim=0, segments=(2,), uneven="whole")),
    ParameterSpec(
        name="one kv head beside queries", shape=(12, 5), cut=Cut(dim=0, segments=(4, 1, 1), uneven="shared")
    ),
    ParameterSpec(name="two beside queries", shape=(5, 16), cut=Cut(dim=1, segments=(4, 2, 2), uneven="shared")),
    ParameterSpec(name="vocabulary", shape=(11, 3), cut=Cut(dim=0, segments=(11,), uneven="ceil")),
)


@pytest.mark.parametrize("parameter", SPECS, ids=lambda p: p.name)
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_pieces_tile_the_global_and_the_local_tensor(parameter: ParameterSpec, tp: int, shards: int) -> None:
    covered = torch.zeros(parameter.shape)
    whole = parameter.cut is None or parameter.cut.is_whole(tp)
    for tp_rank in range(1 if whole else tp):
        shape = parameter.local_shape(tp, tp_rank)
        for shard in range(shards):
            start, stop = shard_rows(shape[0], shards, shard)
            local = torch.zeros(stop - start, *shape[1:])
            for piece in pieces_of(parameter, tp, tp_rank, shards, shard):
                box(local, piece.local_offset, piece.size).add_(1)
                box(covered, piece.global_offset, piece.size).add_(piece.is_first)
            assert torch.equal(local, torch.ones_like(local))
    assert torch.equal(covered, torch.ones_like(covered))


def test_a_kv_head_beside_queries_is_on_the_ranks_whose_queries_use_it() -> None:
    parameter = ParameterSpec(name="qkv", shape=(16, 5), cut=Cut(dim=0, segments=(4, 2, 2), uneven="shared"))
    held = [
        [(p.global_offset[0], p.size[0], p.copies, p.is_first) for p in pieces_of(parameter, 4, r, 1, 0)]
        for r in range(4)
    ]
    assert held[0] == [(0, 2, 1, True), (8, 2, 2, True), (12, 2, 2, True)]
    assert held[1] == [(2, 2, 1, True), (8, 2, 2, False), (12, 2, 2, False)]
    assert held[3] == [(6, 2, 1, True), (10, 2, 2, False), (14, 2, 2, False)]
    assert [parameter.cut.misfit(tp) for tp in (1, 2, 3, 4, 8)] == [None, None, 4, None, None]  # type: ignore[union-attr]


@pytest.mark.parametrize(("rows", "shards"), [(8, 2), (7, 3), (3, 8), (1, 2)])
def test_rows_of_a_shard_are_those_of_torch_chunk(rows: int, shards: int) -> None:
    chunks = list(torch.arange(rows).chunk(shards))
    chunks += [torch.arange(0)] * (shards - len(chunks))
    for shard, chunk in enumerate(chunks):
        start, stop = shard_rows(rows, shards, shard)
        assert list(range(start, stop)) == chunk.tolist()
