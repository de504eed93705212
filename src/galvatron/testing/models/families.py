"""The sizes of tiny models of every family, in Hugging Face's own words.

Awkward on purpose: the vocabulary divides by nothing, layers do not divide by stages, Mistral's window is shorter than
the test sequences.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

_GPT2: dict[str, Any] = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_LLAMA: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_CAUSAL: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "qwen2": {**_LLAMA, "tie_word_embeddings": True, "vocab_size": 101},
    "qwen3": {**_LLAMA, "head_dim": 16, "num_hidden_layers": 5},
    "mistral": {**_LLAMA, "sliding_window": 5, "head_dim": 8, "vocab_size": 257},
    "gemma2": {**_LLAMA, "head_dim": 16, "sliding_window": 5, "tie_word_embeddings": True},
    "gemma3_text": {**_LLAMA, "head_dim": 16, "sliding_window": 5, "tie_word_embeddings": True},
    "phi3": _LLAMA,
    "olmo2": _LLAMA,
    "granite": {
        **_LLAMA,
        "logits_scaling": 1.5,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
    },
    "glm4": {**_LLAMA, "head_dim": 8},
    "smollm3": {**_LLAMA, "no_rope_layer_interval": 2},
    "starcoder2": {**_LLAMA, "sliding_window": None, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "cohere": {**_LLAMA, "tie_word_embeddings": True, "logit_scale": 0.5},
    "gpt_neox": {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"},
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_LLAMA, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        **_LLAMA,
        "head_dim": 8,
        "sliding_window": 5,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "opt": {
        "vocab_size": 97,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    },
}
FAMILIES: tuple[str, ...] = tuple(_CAUSAL)
"""Causal language models."""

_BERT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 1,
}
_VIT: dict[str, Any] = {
    **{key: value for key, value in _BERT.items() if key.startswith(("hidden", "inter", "num_", "attention"))},
    "image_size": 12,
    "patch_size": 4,
    "num_labels": 5,
}
_OTHERS: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "modernbert": {
        **{key: value for key, value in _BERT.items() if "drop" not in key},
        "local_attention": 10,
        "global_attn_every_n_layers": 3,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "cls_token_id": 0,
        "sep_token_id": 0,
    },
    "t5": {
        "vocab_size": 97,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
    },
    "bart": {
        "vocab_size": 97,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 40,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "forced_eos_token_id": None,
        "decoder_start_token_id": 2,
    },
    "whisper": {
        "vocab_size": 97,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 40,
        "num_mel_bins": 6,
        "max_source_positions": 12,
        "max_target_positions": 64,
        "dropout": 0.0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
    "llava": {
        "text_config": {"model_type": "llama", **_LLAMA, "num_hidden_layers": 2},
        "vision_config": {"model_type": "clip_vision_model", **_VIT, "num_hidden_layers": 3, "attention_dropout": 0.0},
        "image_token_id": 96,
        "image_seq_length": 9,
    },
    "qwen2_vl": {
        "text_config": {
            **_LLAMA,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        "vision_config": {
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "patch_size": 2,
            "mlp_ratio": 2,
        },
        "image_token_id": 96,
        "video_token_id": 95,
    },
    "clip": {
        "text_config": {**_BERT, "num_hidden_layers": 2, "eos_token_id": 2, "bos_token_id": 0, "projection_dim": 24},
        "vision_config": {**_VIT, "num_hidden_layers": 3, "projection_dim": 24},
        "projection_dim": 24,
    },
    "siglip": {
        "text_config": {**_BERT, "num_hidden_layers": 2, "projection_size": 32, "bos_token_id": 0, "eos_token_id": 0},
        "vision_config": {**_VIT, "num_hidden_layers": 2, "image_size": 16},
    },
    "vit": {**_VIT, "image_size": 16},  # 17 tokens, a prime
    "dinov2": {**_VIT, "num_labels": 5},
    "swin": {
        "image_size": 20,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 3, 2],
        "num_heads": [8, 8, 8],
        "window_size": 2,
        "mlp_ratio": 1.5,
        "drop_path_rate": 0.0,
        "num_labels": 5,
    },  # 100, 25 and 9 tokens: windows are filled up, and so are sequences that are cut
}
ENCODERS: tuple[str, ...] = tuple(_OTHERS)
"""Those whose ends see whole sequences: of words, and of images."""
STAGED = ("swin",)
"""Those with heads by stage, of which tp 8 divides all."""
_DEEPSEEK: dict[str, Any] = {
    **_LLAMA,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_OVERRIDES = {**_CAUSAL, **_OTHERS, "deepseek_v3": _DEEPSEEK, "gpt_bigcode": _GPT2}
"""The last two for tests alone: of router biases, and of one key-value head beside all queries."""

SMOOTH: dict[str, dict[str, Any]] = {
    "opt": {"activation_function": "gelu"},
    "t5": {"feed_forward_proj": "gelu"},
    "mixtral": {"num_experts_per_tok": 4},
    "qwen3_moe": {"num_experts_per_tok": 4},
    "gpt_oss": {"num_experts_per_tok": 4},
}
"""What takes the jumps out of a family: a ReLU, and a router that leaves experts out."""


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """A configuration of ``family``, one of those above, with Hugging Face's keys in ``overrides`` replaced."""
    return AutoConfig.for_model(family, **{**_OVERRIDES[family], **overrides})
