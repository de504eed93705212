"""Which device, which models and which batches: large ones on a GPU, small ones on a CPU.

Takes nothing; gives records and Hugging Face configs.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from transformers import LlamaConfig

from galvatron.core.model import Precision, Recompute
from galvatron.models import meta_model
from galvatron.parallelize import ParallelModel
from galvatron.plan import LayerStrategy, Plan
from galvatron.profile.compute import device_name, memory_bytes
from galvatron.train.optimizer import update

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


def one_device_plan(work: Work, micro_batch_size: int, precision: Precision, recompute: Sequence[Recompute]) -> Plan:
    """A plan of one device whose layers recompute as given."""
    return Plan(
        model=work.model,
        world_size=1,
        layers_per_stage=(len(recompute),),
        num_microbatches=work.global_batch_size // micro_batch_size,
        global_batch_size=work.global_batch_size,
        seq_len=work.seq_len,
        precision=precision,
        embedding=LayerStrategy(),
        layers=tuple(LayerStrategy(recompute=mode) for mode in recompute),
        head=LayerStrategy(),
    )


def train(model: ParallelModel, optimizer: torch.optim.AdamW, ids: torch.Tensor, labels: torch.Tensor) -> float:
    """A whole step as the trainer takes it; its loss, once all is done."""
    loss = model.train_step(ids, labels)
    update(optimizer, loss, model.clip_grad_norm_(None), 1.0)
    return float(loss)


def describe(connection: Connection, device: str) -> None:
    """Sends what ``device`` is; in a process of its own, for whoever asks holds a context from then on.

    Fails where there is a GPU that this process cannot use: what was meant for a GPU never runs on a CPU in silence.
    """
    kind = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.device_count() > 0) else "cpu"
    place = torch.device(kind)
    torch.zeros(1, device=place)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    connection.send({"type": kind, "name": device_name(place), "memory_bytes": memory_bytes(place), **versions})


class DrawnWeights:
    """Weights of a model by name, drawn where they are asked for: fast, of the usual size, equal for no two calls."""

    origin = "the benchmark"

    def __init__(self, config: LlamaConfig, device: torch.device) -> None:
        self._device = device
        self._shapes = {name: tuple(p.shape) for name, p in meta_model(config).named_parameters()}  # a tied one once

    @property
    def keys(self) -> list[str]:
        return list(self._shapes)

    def find(self, name: str) -> str | None:
        return name if name in self._shapes else None

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        value = torch.empty(size, device=self._device)
        return value.normal_(0, 0.02) if len(size) > 1 else value.fill_(1.0)
