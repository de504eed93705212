"""A job that trains in seconds on two processes of this machine: its model's config, and its file."""

from __future__ import annotations

from typing import Any

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def job_text(model: str = 'path = "config.json"', **train: float) -> str:
    """A job file: what its [model] says, and settings of [train]."""
    settings = {"global_batch_size": 4, "seq_len": 16, "num_steps": 4, **train}
    return f"""
[model]
{model}
[data]
source = "text.txt"
[cluster]
num_processes = 2
device = "cpu"
[train]
""" + "".join(f"{name} = {value}\n" for name, value in settings.items())
