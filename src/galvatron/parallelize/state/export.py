"""A Hugging Face directory that ``from_pretrained`` loads, written one tensor at a time.

Takes tensors by Hugging Face name, in order, from a parallel model or from a checkpoint; memory stays bounded
by one of them.  A tied head is stored once, as the embedding.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from galvatron.core.files import check_folder, new_folder, write_atomic

from .safetensors_file import Entry, fsync_directory, write_safetensors

MAX_SHARD_BYTES = 5_000_000_000  # the default of transformers' save_pretrained before version 5: 5 GB


def write_hf_directory(
    directory: Path,
    config: Any,
    entries: Sequence[Entry],
    tensors: Iterator[torch.Tensor],
    tokenizer: Any,
    max_shard_bytes: int,
) -> None:
    """Write ``tensors`` (as ``entries`` say), ``config`` and, if given, a Hugging Face ``tokenizer``.

    ``directory`` must be new or empty and appears whole or not at all.
    Raises OutputError if it is not empty or the disk refuses.
    """
    check_folder(directory, "an export's directory", new=True)
    with new_folder(directory) as temporary:
        _write_shards(temporary, entries, tensors, max_shard_bytes)
        _export_config(config, entries[0].dtype).save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        fsync_directory(temporary)


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
    if not config.architectures:
        exported.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    return exported
