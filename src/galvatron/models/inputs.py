"""What models of each task take: inputs by name."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from galvatron.core.tasks import Task


def input_shapes(
    config: PretrainedConfig, task: Task, rows: int, seq_len: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and shape of every input that a model cannot do without: ids [rows, seq_len], or images."""
    if task == "image_classification":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": (torch.float32, (rows, config.num_channels, height, width))}
    ids = (torch.int64, (rows, seq_len))
    if task == "seq2seq_lm":
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}


def blank_inputs(
    config: PretrainedConfig, task: Task, rows: int, seq_len: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Zeros of these shapes."""
    shapes = input_shapes(config, task, rows, seq_len)
    return {name: torch.zeros(shape, dtype=dtype, device=device) for name, (dtype, shape) in shapes.items()}


def random_inputs(
    config: PretrainedConfig, task: Task, rows: int, seq_len: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Ids of the vocabulary and normal numbers of these shapes."""

    def drawn(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if dtype == torch.int64:
            return torch.randint(config.vocab_size, shape, generator=generator)
        return torch.randn(shape, dtype=dtype, generator=generator)

    return {name: drawn(*made) for name, made in input_shapes(config, task, rows, seq_len).items()}
