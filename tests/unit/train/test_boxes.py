"""Any tiling of a tensor loads from any other: no processes, the ranks' plans are run in turn."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galvatron.core.errors import CheckpointError
from galvatron.train.boxes import Box, BoxLoadPlanner, BoxSavePlanner, Held
from galvatron.train.index import CheckpointIndex, read_tensor
from galvatron.train.storage import PieceReader, PieceWriter

State = dict[str, Held]


def save(directory: Path, ranks: list[State]) -> CheckpointIndex:
    writer = PieceWriter(directory)
    planners, plans = [], []
    for state in ranks:
        planner = BoxSavePlanner()
        planner.set_up_planner(state)
        planners.append(planner)
        plans.append(planner.create_local_plan())
    plans, metadata = planners[0].create_global_plan(plans)
    plans = writer.prepare_global_plan(plans)
    results = [writer.write_data(plan, planner).value() for plan, planner in zip(plans, planners, strict=True)]
    writer.finish(metadata, results)
    assert writer.index is not None
    return CheckpointIndex.from_json(writer.index.to_json())


def load(directory: Path, index: CheckpointIndex, state: State) -> None:
    reader, planner = PieceReader(directory, index), BoxLoadPlanner()
    planner.set_up_planner(state, reader.read_metadata())
    reader.read_data(planner.create_local_plan(), planner).value()


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...], num_ranks: int) -> list[list[tuple[slice, ...]]]:
    """Boxes that tile ``shape`` (a grid of random cuts), dealt to ranks at random."""
    segments = []
    for size in shape:
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))})
        segments.append([slice(low, high) for low, high in itertools.pairwise(cuts)])
    ranks: list[list[tuple[slice, ...]]] = [[] for _ in range(num_ranks)]
    for box in itertools.product(*segments):
        ranks[draw(st.integers(0, num_ranks - 1))].append(box)
    return ranks


def as_held(values: torch.Tensor, boxes: list[tuple[slice, ...]]) -> Held:
    return Held(
        tuple(values.shape), values.dtype, tuple(Box(tuple(s.start for s in box), values[box].clone()) for box in boxes)
    )


@settings(deadline=None, max_examples=60)
@given(data=st.data(), shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple))
def test_random_cuts_load_into_random_cuts(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, shape: tuple[int, ...]
) -> None:
    directory = tmp_path_factory.mktemp("boxes")
    whole = torch.randn(shape)
    saved = data.draw(tilings(shape, data.draw(st.integers(1, 4))))
    index = save(directory, [{"w": as_held(whole, boxes)} for boxes in saved])
    assert torch.equal(read_tensor(directory, "w", index.tensors["w"]), whole)
    for boxes in data.draw(tilings(shape, data.draw(st.integers(1, 4)))):
        state = {"w": as_held(torch.full(shape, torch.nan), boxes)}
        load(directory, index, state)
        for slices, box in zip(boxes, state["w"].boxes, strict=True):
            assert torch.equal(box.values, whole[slices])


def test_a_hole_in_the_checkpoint_is_refused(tmp_path: Path) -> None:
    whole = torch.randn(4, 2)
    halves = [[(slice(0, 2), slice(0, 2))], [(slice(2, 4), slice(0, 2))]]
    index = save(tmp_path, [{"w": as_held(whole, boxes)} for boxes in halves])
    second = index.to_json().replace('"offset":[2,0]', '"offset":[0,0]')
    with pytest.raises(CheckpointError, match="do not tile"):
        CheckpointIndex.from_json(second)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"shape":[4,2],"dtype"', '"shape":[5,2],"dtype"', "do not tile"),
        ('"byte_offset":', '"byte_offset":9', "beyond the end of"),
        ('"offset":[0,0]', '"offset":[3,0]', "has a chunk outside"),
        ('"F32"', '"O"', "has dtype O"),
        ('"rank-00000.safetensors":', '"../../etc/passwd":', "is no plain file name"),
        ('"version":2', '"version":1', "has version 1; this galvatron reads version 2: use the release that wrote it"),
        ('"tensors":{"w"', '"tensors":{"v"', "its entries are not those that were saved"),
        ('"num_bytes":', '"num_bytes":1', "its entries are not those that were saved"),
        ('{"format"', '[{"format"', "is not JSON"),
    ],
)
def test_a_malformed_index_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    text = save(tmp_path, [{"w": as_held(torch.randn(4, 2), [(slice(0, 4), slice(0, 2))])}]).to_json()
    assert old in text
    with pytest.raises(CheckpointError, match=words):
        CheckpointIndex.from_json(text.replace(old, new, 1))


def test_rank_files_are_safetensors_that_others_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    whole = torch.randn(3, 2)
    save(tmp_path, [{"w": as_held(whole, [(slice(0, 3), slice(0, 2))])}])
    tensors = load_file(tmp_path / "rank-00000.safetensors")
    assert torch.equal(tensors["w@0,0"], whole)
