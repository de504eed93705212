"""ModelSpec of a Hugging Face ``config.json``, from its numbers alone.

Takes a configuration as a mapping; gives every parameter with its tensor-parallel cut, one function a family.
For the families that the runtime knows the result equals ``galvatron.models.build_spec``.  Knows nothing of devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from galvatron.core.defects import sentence
from galvatron.core.errors import ConfigError
from galvatron.core.model import ModelSpec
from galvatron.core.words import shown

from .decoders import deepseek_v3, gpt2, gpt_neox, llama, mixtral, qwen3_moe
from .encoders import bert, swin, t5, vit
from .parts import Config

Family = Callable[[Config, str], ModelSpec]
# Defaults are those of the library's config classes (transformers 5), for keys that files leave out.
FAMILIES: dict[str, tuple[Family, dict[str, Any]]] = {
    "llama": (llama, {"max_position_embeddings": 2048}),
    "mistral": (llama, {"num_key_value_heads": 8, "max_position_embeddings": 131072}),
    "qwen2": (llama, {"num_key_value_heads": 32, "max_position_embeddings": 32768, "qkv_bias": True}),
    "qwen3": (
        llama,
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128, "qk_norm": True},
    ),
    "gpt2": (gpt2, {"tie_word_embeddings": True}),
    "gpt_neox": (gpt_neox, {}),
    "mixtral": (mixtral, {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3_moe": (qwen3_moe, {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "qk_norm": True}),
    "deepseek_v3": (deepseek_v3, {}),
    "bert": (bert, {"tie_word_embeddings": True}),
    "t5": (t5, {"tie_word_embeddings": True}),
    "vit": (vit, {"num_channels": 3, "num_labels": 1000}),
    "swin": (swin, {"num_channels": 3, "num_labels": 1000, "mlp_ratio": 4.0, "patch_size": 4}),
}


def spec_of_config(config: Mapping[str, Any], name: str) -> ModelSpec:
    """The model that ``config`` describes, called ``name``.

    Sequences of vision models are patches: ``max_seq_len`` is (image / patch)², one more with a class token, and
    ``vocab_size`` is the number of classes.

    Raises:
        ConfigError: its family is unknown, a size is missing, or sizes contradict each other.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"model_type={shown(model_type)} has no shapes here; choose one of {', '.join(sorted(FAMILIES))}"
        )
    family, defaults = FAMILIES[model_type]
    try:
        return family(Config(config, **defaults), name)
    except ValidationError as failure:
        raise ConfigError(f"model {name}: {sentence(ModelSpec, failure)}; give a Hugging Face config.json") from None
