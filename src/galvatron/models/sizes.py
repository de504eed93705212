"""How large a tiny twin is: sizes by the names that configs give them.

Takes names and values of a config; gives small values.  Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEADS, HEAD_DIM, LAYERS, FFN, WORDS, SEQ_LEN, PATCH, CLASSES, SPAN = 4, 16, 4, 56, 97, 16, 4, 5, 5
HIDDEN, EXPERT = HEADS * HEAD_DIM, 24
SIZES: dict[str, int] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": WORDS,
    "max_position_embeddings": 4 * SEQ_LEN,
    "intermediate_size": FFN,
    "ffn_dim": FFN,
    "n_inner": FFN,
    "ffn_hidden_size": FFN,
    "moe_intermediate_size": EXPERT,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": HEAD_DIM,
    "d_kv": HEAD_DIM,
    "max_source_positions": SEQ_LEN // 2,
    "num_mel_bins": 8,
    "word_embed_proj_dim": HIDDEN,
    "shared_expert_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 40,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_nope_head_dim": HEAD_DIM // 2,
    "qk_rope_head_dim": HEAD_DIM,
    "qk_head_dim": HEAD_DIM // 2 + HEAD_DIM,
    "v_head_dim": HEAD_DIM,
    "rotary_dim": HEAD_DIM // 2,
    "index_head_dim": 2 * HEAD_DIM,
    "local_attention": 2 * SPAN,
    "attention_window": 2 * SPAN,
    "patch_size": PATCH,
    "mm_tokens_per_image": 4,
    "coordinate_size": 12,
    "shape_size": 8,
}
ENDINGS: dict[str, int] = {
    "layers": LAYERS,
    "depth": LAYERS,
    "heads": HEADS,
    "n_head": HEADS,
    "num_head": HEADS,
    "experts": 4,
    "head_dim": HEAD_DIM,
    "head_size": HEAD_DIM,
    "d_head": HEAD_DIM,
    "dim_head": HEAD_DIM,
    "headdim": HEAD_DIM,
    "state_size": HEAD_DIM,
    "d_state": HEAD_DIM,
    "kv_channels": HEAD_DIM,
    "hidden_size": HIDDEN,
    "embed_dim": HIDDEN,
    "embedding_dim": HIDDEN,
    "embed_size": HIDDEN,
    "emb_size": HIDDEN,
    "d_model": HIDDEN,
    "dim_model": HIDDEN,
    "output_dim": HIDDEN,
    "output_size": HIDDEN,
    "projection_dim": HIDDEN,
    "projection_size": HIDDEN,
    "project_dim": HIDDEN,
    "proj_dim": HIDDEN,
    "lru_width": HIDDEN,
    "d_ssm": 2 * HIDDEN,
    "d_latents": HIDDEN,
    "output_channels": HIDDEN,
    "bottleneck_size": HIDDEN,
    "embedding_rank": HEAD_DIM,
    "lora_rank": 24,
    "dt_rank": 8,
    "intermediate_size": FFN,
    "intermediate_size_mlp": FFN,
    "ffn_dim": FFN,
    "feed_forward_size": FFN,
    "hidden_dim": FFN,
    "mlp_dim": FFN,
    "expert_dim": EXPERT,
    "d_ff": FFN,
    "dim_ff": FFN,
    "dff": FFN,
    "d_inner": FFN,
    "vocab_size": WORDS,
    "vocab": WORDS,
    "vocab_size_base": WORDS,
    "hash_buckets": WORDS,
    "num_latents": SEQ_LEN // 2,
    "multiple_of": 8,
    "kv_lora_rank": 24,
}
"""What else a name may end in; a value that is smaller stays."""
POSITIONS = ("position_embeddings", "max_target_positions", "max_text_positions", "max_seq_len", "n_ctx")
"""How a name of places for tokens ends, of which a twin has enough for its own."""
STACKED = ("encoder_layers", "decoder_layers")
"""How a number of layers ends that a twin has several of, or a model of one would hide that they are a stack."""
NARROW, EMBEDDING = "embedding_size", 40
"""A width of embeddings that is not that of hidden states, which takes a projection."""
IMAGE_SIZES = ("patch_size", "max_source_positions", "num_mel_bins")
STAGED = ("embed_dim", "hidden_size", "num_heads")
"""Sizes of the first of several stages, whose factors hang together."""
MOST = {"n_group": 2, "num_expert_group": 2, "topk_group": 1}
"""Sizes that may be smaller: groups of experts."""
SPANS = ("window", "chunk", "topk", "block_size")
"""In keys of what limits whom a token sees: a twin's sequences are longer, or it would not show."""
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TAKEN_KEYS = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
EXPANDED = {
    "mamba_n_heads": ("mamba_expand", "mamba_d_head"),
    "mamba_num_heads": ("expand", "mamba_head_dim"),
    "n_mamba_heads": ("mamba_expand", "mamba_headdim"),
    "num_heads": ("expand", "head_dim"),
}
"""Counts of heads that together are so many times as wide as hidden states: by which factor, and how wide each is."""


def is_size(value: object) -> bool:
    """Whether a value of a config counts something."""
    return isinstance(value, int) and not isinstance(value, bool)


def shrunk(name: str, value: int, hidden: int | None) -> int:
    """The size of a twin where a config has ``value`` as ``name``, and hidden states ``hidden`` wide."""
    if name.endswith(NARROW):
        return HIDDEN if value == hidden else min(value, EMBEDDING)
    if name in SIZES:
        return SIZES[name]
    if name.endswith(POSITIONS):
        return 4 * SEQ_LEN
    if name.endswith(STACKED):
        return LAYERS
    if name in MOST:
        return min(value, MOST[name])
    ending = max((end for end in ENDINGS if name == end or name.endswith("_" + end)), key=len, default=None)
    if ending is None:
        return value
    return HIDDEN if ENDINGS[ending] == HIDDEN and value == hidden else min(value, ENDINGS[ending])


def expanded(given: Mapping[str, Any], hidden: int) -> dict[str, int]:
    """The counts of heads of ``given`` sizes that follow from ``hidden``, the width of hidden states."""
    found = {}
    for heads, (factor, width) in EXPANDED.items():
        times, wide = given.get(factor), given.get(width)
        if heads in given and isinstance(times, (int, float)) and isinstance(wide, int):
            found[heads] = int(times * hidden) // wide
    return found
