"""How a checkpoint lies on disk: one safetensors file a rank, and ``metadata.json`` that says what is where.

Storage for torch.distributed.checkpoint that neither writes nor reads pickles: PyTorch's own metadata file
is a pickle, and loading a crafted one runs its code.  Knows nothing of models or optimizers.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import NonNegativeInt, model_validator
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

from galvatron.core.errors import CheckpointError, GalvatronError
from galvatron.core.records import FileRecord, Record
from galvatron.parallelize.safetensors_file import DTYPE_NAMES, DTYPES, Entry, write_safetensors

INDEX_FILE = "metadata.json"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Chunk(Record):
    """A box of a global tensor and where its row-major bytes start."""

    offset: tuple[NonNegativeInt, ...]
    shape: tuple[NonNegativeInt, ...]
    file: str
    byte_offset: NonNegativeInt


class StoredTensor(Record):
    """A global tensor: its shape, safetensors dtype name and the chunks that tile it."""

    shape: tuple[NonNegativeInt, ...]
    dtype: str
    chunks: tuple[Chunk, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return DTYPES[self.dtype]


class CheckpointIndex(FileRecord):
    """``metadata.json``: the size of every other file of the directory, and every tensor's chunks."""

    FORMAT: ClassVar[str] = "galvatron.checkpoint"
    ERROR: ClassVar[type[GalvatronError]] = CheckpointError

    files: dict[str, NonNegativeInt]
    tensors: dict[str, StoredTensor]

    @model_validator(mode="after")
    def _chunks_lie_within(self) -> CheckpointIndex:
        for name in self.files:
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no plain file name")
        for name, tensor in self.tensors.items():
            _check_tensor(name, tensor, self.files)
        return self

    def to_json(self) -> str:
        """One line: there are as many chunks as ranks × tensors."""
        body = self.model_dump(mode="json")
        return json.dumps({"format": self.FORMAT, "version": self.VERSION, **body}, separators=(",", ":")) + "\n"

    def check_files(self, directory: Path) -> None:
        """Raise CheckpointError naming the first file that is missing or of another size than recorded."""
        for name, size in self.files.items():
            path = directory / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes"
                raise CheckpointError(
                    f"{path} must have {size} bytes but {state}; the checkpoint is damaged, resume from another one"
                )


def _check_tensor(name: str, tensor: StoredTensor, files: dict[str, int]) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}, known are {', '.join(DTYPES)}")
    for chunk in tensor.chunks:
        ranks_agree = len(chunk.offset) == len(chunk.shape) == len(tensor.shape)
        ends = (o + s for o, s in zip(chunk.offset, chunk.shape, strict=False))
        if not ranks_agree or any(end > size for end, size in zip(ends, tensor.shape, strict=False)):
            raise ValueError(f"{name} of shape {tensor.shape} has a chunk outside: {chunk.offset} + {chunk.shape}")
        if chunk.byte_offset + _num_bytes(chunk.shape, tensor.torch_dtype) > files.get(chunk.file, -1):
            raise ValueError(f"{name} has a chunk beyond the end of {chunk.file}")
    offsets = {chunk.offset for chunk in tensor.chunks}
    volume = sum(math.prod(chunk.shape) for chunk in tensor.chunks)
    if len(offsets) != len(tensor.chunks) or volume != math.prod(tensor.shape):
        raise ValueError(f"the chunks of {name} do not tile its shape {tensor.shape}")


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def map_chunk(directory: Path, tensor: StoredTensor, chunk: Chunk) -> torch.Tensor:
    """The chunk's values [*chunk.shape] as a CPU tensor over a private, copy-on-write map of the file."""
    num_bytes = _num_bytes(chunk.shape, tensor.torch_dtype)
    path = directory / chunk.file
    raw = np.memmap(path, dtype=np.uint8, mode="c", offset=chunk.byte_offset, shape=(num_bytes,))
    return torch.from_numpy(raw).view(tensor.torch_dtype).reshape(chunk.shape)


def read_tensor(directory: Path, tensor: StoredTensor) -> torch.Tensor:
    """The whole global tensor [*tensor.shape], put together from its chunks, on the CPU."""
    whole = torch.empty(tensor.shape, dtype=tensor.torch_dtype)
    for chunk in tensor.chunks:
        box = tuple(slice(o, o + s) for o, s in zip(chunk.offset, chunk.shape, strict=True))
        whole[box] = map_chunk(directory, tensor, chunk)
    return whole


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
        offsets = write_safetensors(self.directory / plan.storage_data, entries, chunks)  # type: ignore[arg-type]
        results = [
            WriteResult(index=item.index, size_in_bytes=entry.num_bytes, storage_data=(plan.storage_data, offset))
            for item, entry, offset in zip(plan.items, entries, offsets, strict=True)
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
                file, byte_offset = places[MetadataIndex(name, chunk.offsets)]
                chunks.append(
                    Chunk(offset=tuple(chunk.offsets), shape=tuple(chunk.sizes), file=file, byte_offset=byte_offset)
                )
            dtype = DTYPE_NAMES[stored.properties.dtype]
            tensors[name] = StoredTensor(shape=tuple(stored.size), dtype=dtype, chunks=tuple(chunks))
        files = {path.name: path.stat().st_size for path in sorted(self.directory.iterdir())}
        unseen = {file for file, _ in places.values()} - files.keys()
        if unseen:
            raise CheckpointError(
                f"rank 0 does not see {', '.join(sorted(unseen))} in {self.directory}; "
                "put the run directory on a disk that all nodes share"
            )
        self.index = CheckpointIndex(files=files, tensors=tensors)

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
