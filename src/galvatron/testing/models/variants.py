"""Families with overrides, adapters and frozen parameters: the rows of the parity tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from galvatron.core.lora import Lora
from galvatron.models import freeze_parameters
from galvatron.models.lora import attach_lora

from .families import FAMILIES, SMOOTH, STAGED, tiny_config
from .weights import draw_weights, tiny_model


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
        overrides = {**(SMOOTH.get(self.family, {}) if smooth else {}), **self.overrides}
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
    Variant("qwen2_vl", "qwen2_vl"),
    Variant("qwen2_vl-tower-frozen", "qwen2_vl", freeze=("*visual*",)),
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
