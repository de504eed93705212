"""Writing a trained model as a Hugging Face directory that ``from_pretrained`` loads.

Takes a parallel model (its parts are sent to rank 0 one tensor at a time) or a checkpoint (read in one
process, one tensor at a time); memory stays bounded by one tensor.  A tied head is stored once, as the embedding.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from galvatron.core.errors import CheckpointError, ConfigError
from galvatron.core.records import write_atomic

from .boxes import held, place
from .checkpoint import CONFIG_FILE, is_weight
from .interface import LocalPart, TrainableModel
from .ranks import all_gather, communication_device, on_rank_zero, rank
from .safetensors_file import Entry, fsync_directory, write_safetensors
from .storage import INDEX_FILE, CheckpointIndex, read_tensor

MAX_SHARD_BYTES = 5_000_000_000  # the default of transformers' save_pretrained before version 5: 5 GB

Boxes = list[tuple[tuple[int, ...], tuple[int, ...]]]
Table = list[dict[str, tuple[tuple[int, ...], Boxes]]]


def save_hf(
    model: TrainableModel,
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write ``model``'s weights in ``dtype``, its config and, if given, a Hugging Face ``tokenizer``.

    A collective call; rank 0 writes.  ``directory`` must be new or empty and appears whole or not at all.
    Raises ConfigError if it is not empty, CheckpointError if the disk refuses.
    """
    parts = {part.name: part for part in model.local_parameters if part.is_primary}
    table: Table = all_gather({name: (tuple(part.global_shape), _boxes(part)) for name, part in parts.items()})
    shapes = {name: shape for held_by_rank in table for name, (shape, _) in held_by_rank.items()}
    if rank() != 0:
        for name in shapes:
            if name in parts and _boxes(parts[name]):
                dist.send(_flat(parts[name]), dst=0)

    def write() -> None:
        tensors = _gathered(parts, table, shapes)
        try:
            entries = [Entry(name, dtype, shape) for name, shape in shapes.items()]
            _write_directory(Path(directory), model.config, entries, tensors, tokenizer, max_shard_bytes)
        finally:
            for _ in tensors:  # after a failure the other ranks still wait for their sends to be received
                pass

    on_rank_zero(write)


def checkpoint_to_hf(
    checkpoint: str | Path,
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the weights of a saved ``checkpoint`` as ``save_hf`` does, in one process without a world.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ConfigError: ``directory`` is not empty.
    """
    from transformers import AutoConfig

    source = Path(checkpoint)
    index = CheckpointIndex.load(source / INDEX_FILE)
    index.check_files(source)
    config = AutoConfig.from_pretrained(source / CONFIG_FILE)
    weights = {name: stored for name, stored in index.tensors.items() if is_weight(name)}
    entries = [Entry(name, dtype, stored.shape) for name, stored in weights.items()]
    tensors = (read_tensor(source, stored) for stored in weights.values())
    _write_directory(Path(directory), config, entries, tensors, tokenizer, max_shard_bytes)


def _boxes(part: LocalPart) -> Boxes:
    boxes = held(part.global_shape, part.tensor, part.pieces).boxes
    return [(box.offset, tuple(box.values.shape)) for box in boxes]


def _flat(part: LocalPart) -> torch.Tensor:
    """All boxes of a part, concatenated: [number of elements], on the part's device."""
    boxes = held(part.global_shape, part.tensor, part.pieces).boxes
    return torch.cat([box.values.reshape(-1) for box in boxes])


def _gathered(parts: dict[str, LocalPart], table: Table, shapes: dict[str, tuple[int, ...]]) -> Iterator[torch.Tensor]:
    """On rank 0: every whole tensor of ``shapes``, on the CPU, in order."""
    for name, shape in shapes.items():
        tensor = torch.empty(shape)
        for owner, held_by_rank in enumerate(table):
            boxes = held_by_rank[name][1] if name in held_by_rank else []
            if boxes and owner == 0:
                place(tensor, boxes, _flat(parts[name]).cpu())
            elif boxes:
                count = sum(torch.Size(size).numel() for _, size in boxes)
                received = torch.empty(count, device=communication_device())
                dist.recv(received, src=owner)
                place(tensor, boxes, received.cpu())
        yield tensor


def _write_directory(
    directory: Path,
    config: Any,
    entries: Sequence[Entry],
    tensors: Iterator[torch.Tensor],
    tokenizer: Any,
    max_shard_bytes: int,
) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} must be a new or empty directory to export into; give another one")
    temporary = directory.parent / f".{directory.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_shards(temporary, entries, tensors, max_shard_bytes)
        _export_config(config, entries[0].dtype).save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        fsync_directory(temporary)
        temporary.rename(directory)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error}; check the disk") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_shards(
    directory: Path, entries: Sequence[Entry], tensors: Iterator[torch.Tensor], max_shard_bytes: int
) -> None:
    """``model.safetensors``, or numbered shards with the index file that ``transformers`` reads."""
    shards = _shards(entries, max_shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(directory / name, shard, (next(tensors) for _ in shard))
    if len(shards) > 1:
        weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        total = sum(entry.num_bytes for entry in entries)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
        write_atomic(directory / "model.safetensors.index.json", text)


def _shards(entries: Sequence[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards


def _export_config(config: Any, dtype: torch.dtype) -> Any:
    """``config`` with the dtype and the class that ``from_pretrained`` and others look for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    exported = copy.deepcopy(config)
    exported.dtype = dtype
    exported.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    return exported
