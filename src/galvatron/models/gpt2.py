"""GPT-2: learned positions, biases everywhere, q, k and v fused in one Conv1D."""

from __future__ import annotations

from .family import Family, Region

GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    decoder="transformer",
    embedding="wte",
    position_embedding="wpe",
    layers="h",
    norm="ln_f",
    regions=(
        Region(
            module="attn",
            columns={"c_attn": "heads"},
            rows={"c_proj": "heads"},
            segments={"c_attn": 3},
            local_sizes=("split_size",),
        ),
        Region(module="mlp", columns={"c_fc": "ffn"}, rows={"c_proj": "ffn"}),
    ),
)
