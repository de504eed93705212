"""LLaMA and the families that keep its module names: Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from .family import Family, Region

LLAMA_LIKE = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    decoder="model",
    embedding="embed_tokens",
    layers="layers",
    norm="norm",
    regions=(
        Region(
            module="self_attn",
            columns={"q_proj": "heads", "k_proj": "kv_heads", "v_proj": "kv_heads"},
            rows={"o_proj": "heads"},
        ),
        Region(module="mlp", columns={"gate_proj": "ffn", "up_proj": "ffn"}, rows={"down_proj": "ffn"}),
    ),
)
