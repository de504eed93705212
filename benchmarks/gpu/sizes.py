"""Which device, which models and which batches: large ones on a GPU, small ones on a CPU.

Takes nothing; gives records and Hugging Face configs.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from galvatron.core.tasks import TOKEN_TASKS
from galvatron.models import random_inputs, task_of, twin_config, words_of
from galvatron.profile.compute import device_name, memory_bytes

from .children import Start

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
}
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
_LARGE: dict[str, Any] = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
_CLIP_VISION: dict[str, Any] = _LARGE | {"num_hidden_layers": 24, "patch_size": 14}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS |= {
    "BERT": {"model_type": "bert", "architectures": ["BertForMaskedLM"], "num_hidden_layers": 24}
    | _LARGE
    | _NO_DROPOUT,
    "ViT": {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "num_hidden_layers": 24,
        "num_labels": 1000,
    }
    | _LARGE
    | _NO_DROPOUT,
    "T5": {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "feed_forward_proj": "gated-gelu"}
    | {"d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16, "vocab_size": 32128}
    | {"tie_word_embeddings": False, "dropout_rate": 0.0},
    "CLIP": {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 768}
    | {"vision_config": _CLIP_VISION | {"image_size": 224}}
    | {"text_config": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}},
    "LLaVA": {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "image_token_index": 32000}
    | {"vision_config": _CLIP_VISION | {"model_type": "clip_vision_model", "image_size": 336}}
    | {
        "text_config": {"model_type": "llama", "vocab_size": 32064, "hidden_size": 2048, "num_hidden_layers": 16}
        | {"intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    },
    # a quarter as wide and deep as Qwen3-30B-A3B
    "Qwen3-MoE": {"model_type": "qwen3_moe", "vocab_size": 32000, "hidden_size": 1536, "moe_intermediate_size": 768}
    | {"num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128}
    | {"num_experts": 32, "num_experts_per_tok": 4, "output_router_logits": True},
    "Gemma 2": {"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 12}
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 32000},
}


TINY = "tiny "
"""Before the name of a model: one of its structure that a CPU trains."""


@cache
def config_of(name: str) -> PretrainedConfig:
    """The Hugging Face config of one of ``MODELS``, or of a tiny one."""
    if name not in MODELS:
        return twin_config(config_of(name.removeprefix(TINY)))
    return AutoConfig.for_model(**MODELS[name])


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


Batch = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class Work:
    """A model and a batch; ``micro_batch_size`` is the largest that is tried."""

    model: str
    global_batch_size: int
    seq_len: int
    micro_batch_size: int

    @property
    def sizes(self) -> list[int]:
        """Of microbatches: the largest, then always half of the one before."""
        return [self.micro_batch_size >> shift for shift in range(self.micro_batch_size.bit_length())]

    @property
    def tokens(self) -> int:
        return self.global_batch_size * self.seq_len

    def batch(self, seed: int = 0) -> Batch:
        """Inputs by name, and labels of no meaning, of a global batch on the CPU."""
        config, generator = config_of(self.model), torch.Generator().manual_seed(seed)
        task = task_of(config)
        inputs = random_inputs(config, task, self.global_batch_size, self.seq_len, generator)
        rows, of_tokens = (self.global_batch_size,), task in TOKEN_TASKS
        shape, kinds = ((*rows, self.seq_len), words_of(config)) if of_tokens else (rows, int(config.num_labels or 1))
        return inputs, torch.randint(kinds, shape, generator=generator)


def describe(connection: Connection, device: str) -> None:
    """Sends what ``device`` is; in a process of its own, for whoever asks holds a context from then on.

    Fails where there is a GPU that this process cannot use: what was meant for a GPU never runs on a CPU in silence.
    """
    kind = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.device_count() > 0) else "cpu"
    place = torch.device(kind)
    torch.zeros(1, device=place)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    connection.send({"type": kind, "name": device_name(place), "memory_bytes": memory_bytes(place), **versions})
