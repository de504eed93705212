"""A saved checkpoint as a Hugging Face directory: read in one process, one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from galvatron.parallelize.state.export import MAX_SHARD_BYTES, write_hf_directory
from galvatron.parallelize.state.safetensors_file import Entry

from .checkpoint import CONFIG_FILE, is_weight
from .index import INDEX_FILE, CheckpointIndex, read_tensor


def checkpoint_to_hf(
    checkpoint: str | Path,
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the weights of a saved ``checkpoint`` as ``ParallelModel.save_pretrained`` does, without a world.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        OutputError: ``directory`` is not empty or cannot be written.
    """
    from transformers import AutoConfig

    source = Path(checkpoint)
    index = CheckpointIndex.load(source / INDEX_FILE)
    index.check_heads(source)
    config = AutoConfig.from_pretrained(source / CONFIG_FILE)
    weights = {name: stored for name, stored in index.tensors.items() if is_weight(name)}
    entries = [Entry(name, dtype, stored.shape) for name, stored in weights.items()]
    tensors = (read_tensor(source, name, stored) for name, stored in weights.items())
    write_hf_directory(Path(directory), config, entries, tensors, tokenizer, max_shard_bytes)
