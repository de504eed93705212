"""``metadata.json``: which bytes of which file hold which box of which tensor, and a checksum of every byte.

Takes a directory; gives tensors, or a sentence on every damage.  Knows nothing of models, optimizers or ranks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
import xxhash
from pydantic import NonNegativeInt, model_validator

from galvatron.core.errors import CheckpointError, GalvatronError
from galvatron.core.records import FileRecord, Record
from galvatron.parallelize.state.safetensors_file import DTYPES, checksum

INDEX_FILE = "metadata.json"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_READ_BYTES = 1 << 18  # stays in a core's cache from the read to the sum


class Chunk(Record):
    """A box of a global tensor, where its row-major bytes start, and their checksum."""

    offset: tuple[NonNegativeInt, ...]
    shape: tuple[NonNegativeInt, ...]
    file: str
    byte_offset: NonNegativeInt
    checksum: str


class StoredTensor(Record):
    """A global tensor: its shape, safetensors dtype name and the chunks that tile it."""

    shape: tuple[NonNegativeInt, ...]
    dtype: str
    chunks: tuple[Chunk, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return DTYPES[self.dtype]


class StoredFile(Record):
    """A file's size, and the checksum of its head: what lies before its first chunk, all of a file without one."""

    num_bytes: NonNegativeInt
    head_bytes: NonNegativeInt
    head_checksum: str


class Span(NamedTuple):
    """Bytes of a file with one checksum; ``holds`` names them for people."""

    file: str
    start: int
    num_bytes: int
    checksum: str
    holds: str


class CheckpointIndex(FileRecord):
    """Every other file of the directory, every tensor's chunks, and a checksum of these two entries as JSON."""

    FORMAT: ClassVar[str] = "galvatron.checkpoint"
    VERSION: ClassVar[int] = 2  # 1 had no checksums
    ERROR: ClassVar[type[GalvatronError]] = CheckpointError

    files: dict[str, StoredFile]
    tensors: dict[str, StoredTensor]
    checksum: str

    @classmethod
    def of_directory(cls, directory: Path, tensors: dict[str, StoredTensor]) -> Self:
        """The index of ``directory``, all of whose files are there and hold ``tensors``."""
        starts: dict[str, int] = {}
        for chunk in (chunk for tensor in tensors.values() for chunk in tensor.chunks):
            starts[chunk.file] = min(chunk.byte_offset, starts.get(chunk.file, chunk.byte_offset))
        files = {}
        for path in sorted(directory.iterdir()):
            size = path.stat().st_size
            head = starts.get(path.name, size)
            with path.open("rb") as file:
                files[path.name] = StoredFile(num_bytes=size, head_bytes=head, head_checksum=checksum(file.read(head)))
        return cls(files=files, tensors=tensors, checksum=_checksum_of(files, tensors))

    @model_validator(mode="after")
    def _is_as_written(self) -> CheckpointIndex:
        for name in self.files:
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no plain file name")
        for name, tensor in self.tensors.items():
            _check_tensor(name, tensor, self.files)
        if self.checksum != _checksum_of(self.files, self.tensors):
            raise ValueError("its entries are not those that were saved; resume from another checkpoint")
        return self

    def to_json(self) -> str:
        """One line: there are as many chunks as ranks × tensors."""
        return _one_line({"format": self.FORMAT, "version": self.VERSION, **self.model_dump(mode="json")}) + "\n"

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.num_bytes for file in self.files.values())

    def damage(self, directory: Path, *, part: int = 0, of: int = 1) -> Iterator[str]:
        """What is wrong with the files in ``directory``, a sentence each; ``part`` of ``of`` reads a share of bytes."""
        sizes: dict[str, int | None] = {}
        for span in _share(self._spans(), part, of):
            path, expected = directory / span.file, self.files[span.file].num_bytes
            if span.file not in sizes:
                sizes[span.file] = path.stat().st_size if path.is_file() else None
                if sizes[span.file] != expected:
                    state = "is missing" if sizes[span.file] is None else f"has {sizes[span.file]} bytes"
                    yield f"{path} must have {expected} bytes but {state}"
            if sizes[span.file] == expected and _read_checksum(directory, span) != span.checksum:
                yield f"{path} holds other bytes than were saved: {span.holds} changed"

    def check(self, directory: Path, *, part: int = 0, of: int = 1) -> None:
        """Raise CheckpointError with the first ``damage``."""
        _refuse(self.damage(directory, part=part, of=of))

    def check_heads(self, directory: Path, *names: str) -> None:
        """``check`` sizes, texts and headers alone, of the files ``names`` or of all."""
        files = {name: file for name, file in self.files.items() if not names or name in names}
        self.model_copy(update={"tensors": {}, "files": files}).check(directory)

    def _spans(self) -> list[Span]:
        """All bytes of all files, by file and place."""
        spans = [
            Span(name, 0, file.head_bytes, file.head_checksum, "its text" if name.endswith(".json") else "its header")
            for name, file in self.files.items()
        ]
        for name, tensor in self.tensors.items():
            for chunk in tensor.chunks:
                size = _num_bytes(chunk.shape, tensor.torch_dtype)
                holds = name if chunk.shape == tensor.shape else f"{name} from {list(chunk.offset)}"
                spans.append(Span(chunk.file, chunk.byte_offset, size, chunk.checksum, holds))
        return sorted(spans)


def _one_line(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"))


def _checksum_of(files: dict[str, StoredFile], tensors: dict[str, StoredTensor]) -> str:
    entries = [{name: value.model_dump(mode="json") for name, value in items.items()} for items in (files, tensors)]
    return checksum(_one_line(entries).encode())


def _refuse(damage: Iterable[str]) -> None:
    for first in damage:
        raise CheckpointError(f"{first}; the checkpoint is damaged, resume from another one")


def _share(spans: list[Span], part: int, of: int) -> Iterator[Span]:
    """The spans that begin in the ``part``-th of ``of`` equal shares of all bytes."""
    total, before = sum(span.num_bytes for span in spans), 0
    for span in spans:
        if before * of // max(total, 1) == part or (before == total and part == of - 1):
            yield span
        before += span.num_bytes


def _read_checksum(directory: Path, span: Span) -> str:
    digest, buffer, left = xxhash.xxh3_64(), memoryview(bytearray(_READ_BYTES)), span.num_bytes
    with (directory / span.file).open("rb", buffering=0) as file:
        file.seek(span.start)
        while left > 0 and (count := file.readinto(buffer[: min(left, _READ_BYTES)])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def _check_tensor(name: str, tensor: StoredTensor, files: dict[str, StoredFile]) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}, known are {', '.join(DTYPES)}")
    for chunk in tensor.chunks:
        ranks_agree = len(chunk.offset) == len(chunk.shape) == len(tensor.shape)
        ends = (o + s for o, s in zip(chunk.offset, chunk.shape, strict=False))
        if not ranks_agree or any(end > size for end, size in zip(ends, tensor.shape, strict=False)):
            raise ValueError(f"{name} of shape {tensor.shape} has a chunk outside: {chunk.offset} + {chunk.shape}")
        file_bytes = files[chunk.file].num_bytes if chunk.file in files else -1
        if chunk.byte_offset + _num_bytes(chunk.shape, tensor.torch_dtype) > file_bytes:
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


def read_tensor(directory: Path, name: str, tensor: StoredTensor) -> torch.Tensor:
    """The whole global tensor [*tensor.shape], put together from its chunks, on the CPU.

    Raises CheckpointError if a chunk is not as it was saved.
    """
    whole = torch.empty(tensor.shape, dtype=tensor.torch_dtype)
    for chunk in tensor.chunks:
        values = map_chunk(directory, tensor, chunk)
        if checksum(values.reshape(-1).view(torch.uint8).numpy().data) != chunk.checksum:
            _refuse([f"{directory / chunk.file} holds other bytes than were saved: {name} changed"])
        box = tuple(slice(o, o + s) for o, s in zip(chunk.offset, chunk.shape, strict=True))
        whole[box] = values
    return whole
