"""The groups of a world: made by their members alone, whoever set the default group up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from galvatron.parallelize import World

GPU = torch.device("cuda", 0)


@pytest.fixture
def bound() -> Iterator[Any]:
    """A default group that is bound to a GPU, as ``init_process_group(device_id=...)`` makes it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    default: Any = dist.group.WORLD
    default.bound_device_id = GPU
    try:
        yield default
    finally:
        default.bound_device_id = None
        dist.destroy_process_group()


def test_no_group_is_split_from_one_that_is_bound_to_a_gpu(bound: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would split its communicator, which ranks outside of the group would have to take part in."""
    asked = []

    def new_group(ranks: list[int], **options: Any) -> object:
        asked.append((ranks, bound.bound_device_id, options["device_id"], options["use_local_synchronization"]))
        return object()

    monkeypatch.setattr(dist, "new_group", new_group)
    World(0, 1, 0, GPU, "nccl").group((0,))
    assert asked == [([0], None, GPU, True)]
    assert bound.bound_device_id == GPU


def test_a_group_that_cannot_be_made_leaves_the_default_one_bound(bound: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def new_group(*_: Any, **__: Any) -> object:
        raise RuntimeError("no")

    monkeypatch.setattr(dist, "new_group", new_group)
    with pytest.raises(RuntimeError, match="no"):
        World(0, 1, 0, GPU, "nccl").group((0,))
    assert bound.bound_device_id == GPU
