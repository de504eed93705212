"""Tiny models of every family, with weights that hide nothing.

Takes a family's name and overrides in Hugging Face's own words; gives configurations and float32 models
that train in milliseconds.  Sizes are awkward on purpose: the vocabulary divides by nothing, layers do not
divide by stages, Mistral's window is shorter than the test sequences.  Knows nothing of plans.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from galvatron.core.lora import Lora
from galvatron.models import auto_class, buffers_within, freeze_parameters
from galvatron.models.lora import attach_lora

WEIGHT_STD = 0.15
"""Standard deviation of drawn weights, about 1/√hidden: every layer changes its input visibly."""

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
_OVERRIDES: dict[str, dict[str, Any]] = {
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
FAMILIES: tuple[str, ...] = tuple(_OVERRIDES)
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
_OVERRIDES |= {
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
ENCODERS: tuple[str, ...] = tuple(_OVERRIDES)[len(FAMILIES) :]
"""Those whose ends see whole sequences: of words, and of images."""
STAGED = ("swin",)
"""Those with heads by stage, of which tp 8 divides all."""
_OVERRIDES["deepseek_v3"] = {
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
}  # for tests of router biases alone
_SMOOTH: dict[str, dict[str, Any]] = {
    "opt": {"activation_function": "gelu"},
    "t5": {"feed_forward_proj": "gelu"},
    "mixtral": {"num_experts_per_tok": 4},
    "qwen3_moe": {"num_experts_per_tok": 4},
    "gpt_oss": {"num_experts_per_tok": 4},
}
"""What takes the jumps out of a family: a ReLU, and a router that leaves experts out."""


@dataclass(frozen=True)
class Variant:
    """A family with overrides, perhaps with adapters or frozen parameters: one row of the parity tables."""

    name: str
    family: str
    overrides: dict[str, Any] = field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    lora: Lora | None = None

    @staticmethod
    def named(name: str) -> Variant:
        """The one of ``VARIANTS`` or ``ADAPTED`` called ``name``."""
        return next(variant for variant in (*VARIANTS, *ADAPTED) if variant.name == name)

    def config(self, num_heads: int = 4, *, smooth: bool = False) -> PretrainedConfig:
        """The tiny configuration; tp 8 needs ``num_heads`` 8, tp 3 and 6 need 6, which causal language models can have.

        ``smooth``: with nothing that jumps.  In a half precision two right runs may fall on either side of a jump, and
        gradients of a few tokens then differ by a tenth; in float32 that hardly happens.
        """
        overrides = {**(_SMOOTH.get(self.family, {}) if smooth else {}), **self.overrides}
        if self.family in STAGED:
            return tiny_config(self.family, **overrides)
        if num_heads != 6:
            heads = "n_head" if self.family == "gpt2" else "num_attention_heads"
            return tiny_config(self.family, **{heads: num_heads, **overrides})
        if self.family not in FAMILIES:
            return tiny_config(self.family, **overrides)
        others = {"gpt2": {"n_head": 6, "n_embd": 48}, "opt": {"word_embed_proj_dim": 48}}.get(self.family, {})
        sizes = {} if self.family == "gpt2" else {"num_attention_heads": 6, "hidden_size": 48}
        config = tiny_config(self.family, **{**sizes, **others, **overrides})
        if 6 % getattr(config, "num_key_value_heads", 1):
            config.num_key_value_heads = 6
        return config

    def model(self, num_heads: int = 4, seed: int = 0, *, smooth: bool = False) -> PreTrainedModel:
        """The tiny model, its adapters drawn too, with what is frozen not requiring gradients."""
        model = tiny_model(self.config(num_heads, smooth=smooth), seed)
        if self.lora is not None:
            attach_lora(model, self.lora)
            draw_weights(model, seed)
        freeze_parameters(model, self.freeze)
        return model


VARIANTS: tuple[Variant, ...] = (
    Variant("gpt2", "gpt2", {"n_layer": 5}),
    Variant("gpt2-untied", "gpt2", {"tie_word_embeddings": False}),
    Variant("llama", "llama", {"num_hidden_layers": 5}),
    Variant("llama-tied-one-kv-head", "llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    Variant("llama-tied-pad-is-eos", "llama", {"tie_word_embeddings": True, "pad_token_id": 2, "eos_token_id": 2}),
    Variant("llama-lower-half-frozen", "llama", freeze=("model.embed_tokens.*", "model.layers.[01].*")),
    Variant(
        "gpt2-parts-frozen", "gpt2", freeze=("transformer.wte.*", "transformer.h.[13].*", "*.ln_1.*", "*c_proj.bias")
    ),
    Variant("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    Variant("qwen2", "qwen2"),
    Variant("qwen3", "qwen3"),
    Variant("mistral", "mistral"),
    *(Variant(family, family) for family in FAMILIES[5:] if family != "opt"),
    Variant("opt", "opt", freeze=("*k_proj.bias",)),  # whose true gradient is zero without rotary positions
    Variant("cohere-head-norms", "cohere", {"use_qk_norm": True}),
    Variant("gpt_neox-serial", "gpt_neox", {"use_parallel_residual": False}),
    Variant("bert", "bert", freeze=("*key.bias",)),
    Variant("roberta", "roberta", freeze=("*key.bias",)),
    Variant("modernbert", "modernbert"),
    Variant("t5", "t5"),
    Variant("t5-untied-gated", "t5", {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    Variant("bart", "bart", freeze=("*k_proj.bias",)),
    Variant("whisper", "whisper"),
    Variant("llava", "llava", freeze=("*vision*k_proj.bias", "*encoder.layers.2.*", "*post_layernorm*")),
    Variant("llava-tower-frozen", "llava", freeze=("*vision_tower*",)),
    Variant("clip", "clip", freeze=("*k_proj.bias",)),
    Variant("siglip", "siglip", freeze=("*k_proj.bias",)),
    Variant("vit", "vit", freeze=("*k_proj.bias",)),
    Variant("dinov2", "dinov2", freeze=("*k_proj.bias", "*mask_token")),
    Variant("swin", "swin", freeze=("*k_proj.bias",)),
)
"""GQA and MHA, tied and untied, with and without biases and a padding row, fused and separate projections; frozen
from below, and here and there (a tied weight, whole layers among others, norms and biases)."""

ADAPTED: tuple[Variant, ...] = (
    Variant("llama-lora", "llama", {"num_hidden_layers": 5}, lora=Lora(r=3, lora_alpha=6)),
    Variant(
        "gpt2-lora", "gpt2", freeze=("transformer.h.1.*",), lora=Lora(r=3, target_modules=("c_attn", "mlp.c_proj"))
    ),
    Variant("phi3-lora", "phi3", lora=Lora(r=3)),
    Variant("bert-lora", "bert", lora=Lora(r=3, lora_alpha=1)),
    Variant("t5-lora", "t5", lora=Lora(r=3, lora_alpha=1)),
    Variant("mixtral-lora", "mixtral", lora=Lora(r=3)),
    Variant(
        "llama-lora-one-kv-head", "llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        lora=Lora(r=3, lora_alpha=2, use_rslora=True),
    ),
)  # fmt: skip
"""With adapters by peft: on separate, transposed and fused linears; beside experts, biases, whole heads; encoders."""

SAMPLED: tuple[str, ...] = tuple(variant.name for variant in VARIANTS[11:])
"""Variants of which the default run takes samples: they share the code that the others go through whole."""


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """A configuration of ``family``, one of those above, with Hugging Face's keys in ``overrides`` replaced."""
    return AutoConfig.for_model(family, **{**_OVERRIDES[family], **overrides})


def tiny_model(family: str | PretrainedConfig, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """An unmodified Hugging Face model, float32 on the CPU, all weights drawn from ``seed``.

    Hugging Face starts biases at zero and norms at one, values under which a lost bias or a doubled norm
    goes unseen; here biases and the offsets of norm weights from one are random too.
    """
    config = tiny_config(family, **overrides) if isinstance(family, str) else copy.deepcopy(family)
    return draw_weights(auto_class(config).from_config(config, dtype=torch.float32), seed)


@torch.no_grad()
def draw_weights(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Draw every parameter of ``model`` in place, in the order of ``named_parameters``, and what else files have."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * WEIGHT_STD
        is_norm_weight = parameter.dim() == 1 and name.endswith("weight")
        is_scale = parameter.dim() == 0  # of a contrast: as if all pairs were alike, gradients would cancel
        parameter.copy_(noise + 1 if is_norm_weight else noise + 2 if is_scale else noise)
    for buffer in buffers_within(model).values():  # others have to be zeros
        buffer.copy_(torch.randn(buffer.shape, generator=generator) * WEIGHT_STD)
    return model
