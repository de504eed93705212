"""A saved checkpoint as a Hugging Face directory: read in one process, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from galvatron.core.errors import CheckpointError, ConfigError
from galvatron.core.lora import is_adapters
from galvatron.core.parsing import parse_json, read_text
from galvatron.models.lora import Adapter, adapter_like
from galvatron.parallelize.state.adapters import (
    ADAPTER_CONFIG,
    adapter_name,
    check_alone,
    merge,
    merged_shapes,
    write_adapter,
)
from galvatron.parallelize.state.export import MAX_SHARD_BYTES, write_hf_directory
from galvatron.parallelize.state.safetensors_file import Entry

from .checkpoint import CONFIG_FILE, OPTIMIZER_PREFIX, is_weight
from .index import INDEX_FILE, CheckpointIndex, read_tensor
from .offload import MOMENTS


def checkpoint_to_hf(
    checkpoint: str | Path,
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    adapter_only: bool = False,
) -> None:
    """Write the weights of a saved ``checkpoint`` as ``ParallelModel.save_pretrained`` does, without a world.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        OutputError: ``directory`` is not empty or cannot be written.
        ConfigError: with ``adapter_only``, it has no adapter, or other parameters were trained too.
    """
    from transformers import AutoConfig

    source, out = Path(checkpoint), Path(directory)
    index = CheckpointIndex.load(source / INDEX_FILE)
    index.check_heads(source)
    config = AutoConfig.from_pretrained(source / CONFIG_FILE)
    shapes = {name: stored.shape for name, stored in index.tensors.items() if is_weight(name)}
    adapter = _adapter(source, config, shapes)
    if adapter_only:
        if adapter is None:
            raise ConfigError(f"{source} has no adapter to write alone; export the whole model")
        moment = f"{OPTIMIZER_PREFIX}{MOMENTS[0]}."
        check_alone(name.removeprefix(moment) for name in index.tensors if name.startswith(moment))
        shapes = {name: shape for name, shape in shapes.items() if is_adapters(name)}
    tensors: Iterator[torch.Tensor] = (read_tensor(source, name, index.tensors[name]) for name in shapes)
    if adapter_only and adapter is not None:
        write_adapter(out, adapter, shapes, tensors, dtype, tokenizer)
        return
    if adapter is not None:
        tensors, shapes = merge(shapes, tensors, adapter), merged_shapes(shapes)
    entries = [Entry(name, dtype, shape) for name, shape in shapes.items()]
    write_hf_directory(out, config, entries, tensors, tokenizer, max_shard_bytes)


def _adapter(source: Path, config: Any, names: Any) -> Adapter | None:
    """What the adapter of a checkpoint is, if it has one."""
    name, path = adapter_name(names), source / ADAPTER_CONFIG
    if name is None:
        return None
    described = parse_json(read_text(path, CheckpointError), str(path), CheckpointError, "take another checkpoint")
    try:
        return adapter_like(config, described, name)
    except (TypeError, ValueError) as failure:  # what peft raises where it does not know a setting
        raise CheckpointError(f"{path} describes no adapter that this peft knows ({failure})") from None
