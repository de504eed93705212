"""Storage for torch.distributed.checkpoint: one safetensors file a rank, and the index of what is where.

Neither writes nor reads pickles: PyTorch's own metadata file is one, and loading a crafted one runs its code.
Knows nothing of models or optimizers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from galvatron.core.errors import CheckpointError
from galvatron.parallelize.state.safetensors_file import DTYPE_NAMES, Entry, write_safetensors

from .index import CheckpointIndex, Chunk, StoredTensor, map_chunk


class PieceWriter(StorageWriter):
    """Every rank writes the chunks of its plan to ``rank-NNNNN.safetensors`` in ``directory`` (it exists).

    ``index`` holds the finished index on the coordinator; the caller writes it to disk, last of all.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index: CheckpointIndex | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:  # noqa: D102
        self.index = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:  # noqa: D102
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Name each rank's file."""
        names = (f"rank-{rank:05d}.safetensors" for rank in range(len(plans)))
        return [SavePlan(plan.items, storage_data=name) for plan, name in zip(plans, names, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's chunks, one at a time, and fsync the file."""
        entries = []
        for item in plan.items:
            assert item.tensor_data is not None
            offset = ",".join(map(str, item.tensor_data.chunk.offsets))
            shape = tuple(item.tensor_data.chunk.sizes)
            entries.append(Entry(f"{item.index.fqn}@{offset}", item.tensor_data.properties.dtype, shape))
        chunks = (planner.resolve_data(item) for item in plan.items)
        written = write_safetensors(self.directory / plan.storage_data, entries, chunks)  # type: ignore[arg-type]
        results = [
            WriteResult(index=item.index, size_in_bytes=entry.num_bytes, storage_data=(plan.storage_data, place))
            for item, entry, place in zip(plan.items, entries, written, strict=True)
        ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, after all ranks wrote: put the index together."""
        places = {result.index: result.storage_data for rank_results in results for result in rank_results}
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            chunks = []
            for chunk in stored.chunks:
                file, place = places[MetadataIndex(name, chunk.offsets)]
                chunks.append(
                    Chunk(
                        offset=tuple(chunk.offsets),
                        shape=tuple(chunk.sizes),
                        file=file,
                        byte_offset=place.byte_offset,
                        checksum=place.checksum,
                    )
                )
            dtype = DTYPE_NAMES[stored.properties.dtype]
            tensors[name] = StoredTensor(shape=tuple(stored.size), dtype=dtype, chunks=tuple(chunks))
        unseen = {file for file, _ in places.values()} - {path.name for path in self.directory.iterdir()}
        if unseen:
            raise CheckpointError(
                f"rank 0 does not see {', '.join(sorted(unseen))} in {self.directory}; "
                "put the run directory on a disk that all nodes share"
            )
        self.index = CheckpointIndex.of_directory(self.directory, tensors)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do."""
        return True


class PieceReader(StorageReader):
    """Reads boxes of the tensors of ``index`` from memory-mapped files in ``directory``."""

    def __init__(self, directory: Path, index: CheckpointIndex) -> None:
        self.directory = directory
        self.index = index
        self.chunks = {
            MetadataIndex(name, chunk.offset): chunk
            for name, stored in index.tensors.items()
            for chunk in stored.chunks
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:  # noqa: D102
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index in PyTorch's terms."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    properties=TensorProperties(dtype=stored.torch_dtype),
                    size=torch.Size(stored.shape),
                    chunks=[ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape)) for c in stored.chunks],
                )
                for name, stored in self.index.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:  # noqa: D102
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:  # noqa: D102
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every box that the plan asks for into its destination."""
        for item in plan.items:
            name = item.storage_index.fqn
            values = map_chunk(self.directory, self.index.tensors[name], self.chunks[item.storage_index])
            box = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
            planner.resolve_tensor(item).copy_(values[box])
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do."""
        return True
