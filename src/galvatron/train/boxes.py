"""What one rank holds of global tensors, and how torch.distributed.checkpoint plans to save and load it.

A part of a tensor may be several boxes (a fused qkv, cut by tensor parallelism, then sharded).  Saved boxes
tile the tensor; any other boxes load from where they intersect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from galvatron.parallelize.state.pieces import Piece, box, boxes_of


@dataclass(frozen=True, slots=True)
class Box:
    """A view of a local tensor and its offset in the global tensor."""

    offset: tuple[int, ...]
    values: torch.Tensor

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The box in PyTorch's terms."""
        return ChunkStorageMetadata(torch.Size(self.offset), self.values.size())


@dataclass(frozen=True, slots=True)
class Held:
    """All that this rank holds of one global tensor of ``shape``; no box is empty."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]


def held(shape: Sequence[int], local: torch.Tensor, pieces: Sequence[Piece]) -> Held:
    """The boxes of ``local`` (a plain tensor, not copied) in a global tensor of ``shape``."""
    return Held(tuple(shape), local.dtype, tuple(Box(*found) for found in boxes_of(local, pieces)))


class BoxSavePlanner(SavePlanner):
    """Plans a state dict of ``Held`` values; what several ranks hold must be given by one of them only."""

    def set_up_planner(  # noqa: D102
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self.state: dict[str, Held] = state_dict

    def create_local_plan(self) -> SavePlan:
        """One item a box."""
        return SavePlan(
            [_write_item(name, value, part.chunk) for name, value in self.state.items() for part in value.boxes]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Collect every rank's boxes; they must add up to whole tensors."""
        plans, metadata = create_default_global_save_plan(all_plans)
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            saved, needed = sum(math.prod(chunk.sizes) for chunk in stored.chunks), math.prod(stored.size)
            assert saved == needed, f"primary parts of {name} hold {saved} of {needed} elements"
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:  # noqa: D102
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The values of a box."""
        boxes = self.state[write_item.index.fqn].boxes
        return next(part.values for part in boxes if torch.Size(part.offset) == write_item.index.offset)


def _write_item(name: str, value: Held, chunk: ChunkStorageMetadata) -> WriteItem:
    properties = TensorProperties(dtype=value.dtype)
    data = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(value.shape))
    return WriteItem(index=MetadataIndex(name, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)


class BoxLoadPlanner(LoadPlanner):
    """Fills the boxes of a state dict of ``Held`` values from wherever saved chunks intersect them."""

    def set_up_planner(  # noqa: D102
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self.state: dict[str, Held] = state_dict
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """Every non-empty intersection of a box held with a chunk saved."""
        items = []
        for name, value in self.state.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, stored, [part.chunk for part in value.boxes])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:  # noqa: D102
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:  # noqa: D102
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Never called: checkpoints hold tensors only."""
        raise AssertionError(f"{read_item.dest_index.fqn} is not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The view to fill."""
        index = read_item.dest_index
        part = next(part for part in self.state[index.fqn].boxes if torch.Size(part.offset) == index.offset)
        return box(part.values, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: views were filled in place."""
