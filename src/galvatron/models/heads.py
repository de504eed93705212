"""How many heads a layer's attention has, by what its modules say of themselves."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from galvatron.core.family import Blocks

HEAD_COUNTS = ("num_heads", "n_heads", "n_head", "num_attention_heads")
KV_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads")


def heads_in(layer: nn.Module, config: PretrainedConfig) -> dict[Blocks, int]:
    """Heads of queries, and of keys and values, of ``layer`` in a model of ``config``; one of what has none."""
    own = config_in(layer, config)
    said = (getattr(module, name, None) for module in layer.modules() for name in HEAD_COUNTS)
    own_count: int = getattr(own, "num_attention_heads", 1)
    heads = next((count for count in said if isinstance(count, int)), None) or own_count
    kv_heads = next((count for name in kv_names(own) if (count := getattr(own, name, None))), heads)
    return {"heads": heads, "kv_heads": kv_heads}


def kv_names(config: PretrainedConfig) -> tuple[str, ...]:
    """By what names ``config`` may count heads of keys and values; not by another of the (encoder's) queries."""
    queries = config.attribute_map.get("num_attention_heads", "num_attention_heads")
    return tuple(name for name in KV_HEAD_COUNTS if config.attribute_map.get(name) != queries)


def head_width(config: PretrainedConfig, heads: int, hidden: int) -> int:
    """Elements of one of ``heads`` of layers ``hidden`` wide.

    Of latent attention the mean of queries' and values', which is what FLOPs see.
    """
    rotary, values = getattr(config, "qk_rope_head_dim", None), getattr(config, "v_head_dim", None)
    if isinstance(rotary, int) and isinstance(values, int):
        return (config.qk_nope_head_dim + rotary + values) // 2
    width: int = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or hidden // heads
    return width


def config_in(layer: nn.Module, config: PretrainedConfig) -> PretrainedConfig:
    """The config of a part of the model that a layer's modules have; the model's if they have none."""
    configs = (getattr(module, "config", None) for module in layer.modules())
    return next((found for found in configs if isinstance(found, PretrainedConfig)), config)
