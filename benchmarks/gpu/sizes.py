"""Which device, which models and which batches: large ones on a GPU, small ones on a CPU.

Takes nothing; gives records and Hugging Face configs.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from transformers import LlamaConfig

from galvatron.profile.compute import device_name, memory_bytes

from .children import Start

_LLAMA: dict[str, Any] = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072}
_LLAMA |= {"vocab_size": 128256, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0}
MODELS: dict[str, dict[str, Any]] = {
    # Llama 3.2 of 1.2B and 3.2B, and of Llama 2 the 13B
    "1.2B": _LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    | {"num_attention_heads": 32, "num_key_value_heads": 8},
    "3B": _LLAMA
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}
    | {"num_attention_heads": 24, "num_key_value_heads": 8},
    "13B": _LLAMA
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
    | {"num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000, "tie_word_embeddings": False},
    "tiny": _LLAMA
    | {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "vocab_size": 512}
    | {"num_attention_heads": 8, "num_key_value_heads": 8},
}


def config_of(name: str) -> LlamaConfig:
    """The Hugging Face config of one of ``MODELS``."""
    return LlamaConfig(**MODELS[name])


@dataclass(frozen=True)
class Device:
    """What is measured on; ``memory_bytes`` of one rank, and how processes that use it are started."""

    type: Literal["cpu", "cuda"]
    name: str
    memory_bytes: int
    start: Start = "forkserver"

    @property
    def is_gpu(self) -> bool:
        return self.type == "cuda"

    @property
    def is_large(self) -> bool:
        """Whether it has more memory than an H100."""
        return self.memory_bytes > 100e9


@dataclass(frozen=True)
class Work:
    """A model and a batch; ``micro_batch_size`` is the largest that is tried."""

    model: str
    global_batch_size: int
    seq_len: int
    micro_batch_size: int

    @property
    def tokens(self) -> int:
        return self.global_batch_size * self.seq_len

    def batch(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, labels shifted by one), int64 [global batch, seq_len] on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        vocabulary = MODELS[self.model]["vocab_size"]
        tokens = torch.randint(vocabulary, (self.global_batch_size, self.seq_len + 1), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def describe(connection: Connection, device: str) -> None:
    """Sends what ``device`` is; in a process of its own, for whoever asks holds a context from then on.

    Fails where there is a GPU that this process cannot use: what was meant for a GPU never runs on a CPU in silence.
    """
    kind = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.device_count() > 0) else "cpu"
    place = torch.device(kind)
    torch.zeros(1, device=place)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    connection.send({"type": kind, "name": device_name(place), "memory_bytes": memory_bytes(place), **versions})
