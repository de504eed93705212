from __future__ import annotations

import json

import pytest
from transformers import AutoConfig, GPT2Config, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from galvatron.core.errors import ConfigError
from galvatron.estimate import spec_of_config
from galvatron.models import build_spec, for_task

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 32,
}
SMALL_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 131, "n_positions": 32}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (LlamaConfig, SMALL),
        (LlamaConfig, {**SMALL, "attention_bias": True, "mlp_bias": True, "head_dim": 8, "tie_word_embeddings": True}),
        (LlamaConfig, {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}),
        (MistralConfig, SMALL),
        (MistralConfig, {**SMALL, "sliding_window": None, "head_dim": 32}),
        (Qwen2Config, {**SMALL, "tie_word_embeddings": True}),
        (Qwen3Config, SMALL),
        (Qwen3Config, {**SMALL, "head_dim": 16, "attention_bias": True}),
        (GPT2Config, {**SMALL_GPT2, **SPECIAL}),
        (GPT2Config, {**SMALL_GPT2, **SPECIAL, "n_inner": 80, "tie_word_embeddings": False}),
    ],
    ids=lambda value: value.model_type if isinstance(value, type) else "-",
)
def test_specs_equal_those_of_the_models_themselves(make, keys):
    config: PretrainedConfig = make(**keys)
    spec = spec_of_config({"model_type": config.model_type, **keys}, "small")
    assert spec == build_spec(config, "small")
    assert spec_of_config(config.to_dict(), "small") == spec  # a file with every key says the same


def test_an_unknown_family_lists_the_known():
    with pytest.raises(ConfigError, match=r"model_type='mamba' has no shapes here, only bart, .*whisper; profile"):
        spec_of_config({"model_type": "mamba"}, "small")


@pytest.mark.parametrize("value", [None, 0, -1, 1.5, "64", True])
def test_a_size_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match="hidden_size of a llama config must be a positive integer, got"):
        spec_of_config({"model_type": "llama", **SMALL, "hidden_size": value}, "small")


SWIN = {"model_type": "swin", "embed_dim": 32, "window_size": 7, "image_size": 224, "depths": [2, 2]}


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_heads": [2, 4]},
        {"num_heads": [2, 4, 8], "depths": [2, 3, 1], "qkv_bias": False, "use_absolute_embeddings": True},
        {"num_heads": [4, 8], "image_size": [100, 62], "mlp_ratio": 2.5, "num_labels": 7},  # 25 x 16 patches, 13 x 8
    ],
)
def test_what_is_planned_of_swin_is_what_trains(overrides):
    config = {**SWIN, **overrides}
    assert spec_of_config(config, "small") == build_spec(AutoConfig.for_model(**config), "small")


def test_swin_needs_heads_for_every_stage_and_windows_that_fit():
    with pytest.raises(ConfigError, match="one entry for each of two stages or more"):
        spec_of_config({**SWIN, "num_heads": [2]}, "small")
    with pytest.raises(ConfigError, match="depths of a swin config must be a list"):
        spec_of_config({**SWIN, "depths": 2, "num_heads": [2]}, "small")
    with pytest.raises(
        ConfigError, match="window_size=7 must not exceed the 4 patches a side that the last of 2 stages"
    ):
        spec_of_config({**SWIN, "num_heads": [2, 4], "image_size": 32}, "small")


def test_dense_layers_among_experts_are_refused():
    with pytest.raises(ConfigError, match=r"mlp_only_layers=\[1\] of a qwen3_moe config has no shapes here"):
        spec_of_config({"model_type": "qwen3_moe", **SMALL, "mlp_only_layers": [1]}, "small")


def test_specs_survive_json():
    spec = spec_of_config({"model_type": "llama", **SMALL}, "small")
    assert type(spec).model_validate(json.loads(spec.model_dump_json())) == spec


def test_classes_are_those_named_or_counted():
    keys = {"model_type": "vit", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    image = {"num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    assert spec_of_config({**keys, **image, "num_labels": 7}, "small").vocab_size == 7
    named = spec_of_config({**keys, **image, "id2label": {"0": "cat", "1": "dog"}}, "small")
    assert (named.vocab_size, named.max_seq_len) == (2, 17)
    assert named.head.parameters[-1].local_shape(4, 3) == (2,)  # every rank has all


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model_type": ["llama"]}, r"model_type=\['llama'\] has no shapes here"),
        ({"hidden_size": 10**10}, "hidden_size of a llama config must be a positive integer, got 10000000000"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads of a llama config must be a positive integer, got 0"),
        ({"head_dim": "8"}, "head_dim of a llama config must be a positive integer, got '8'"),
        ({"attention_bias": "yes"}, "attention_bias of a llama config must be true or false, got 'yes'"),
        ({"hidden_size": 2}, "num_attention_heads of a llama config must be a divisor of hidden_size=2, got 4"),
        ({"num_hidden_layers": 10**6}, "^num_hidden_layers=1000000 of a llama config must be at most 16384; give"),
        (
            {"max_position_embeddings": 2**30},
            "^max_position_embeddings=1073741824 of .* must be at most 134217728; give",
        ),
        ({"model_type": "qwen3_moe", "mlp_only_layers": 3}, "mlp_only_layers of a qwen3_moe config must be a list"),
    ],
)
def test_sizes_that_contradict_are_one_sentence(keys, says):
    with pytest.raises(ConfigError, match=says) as caught:
        spec_of_config({"model_type": "llama", **SMALL, **keys}, "small")
    assert "\n" not in str(caught.value)


def test_heads_of_unequal_width_are_refused():
    with pytest.raises(ConfigError, match="n_head of a gpt2 config must be a divisor of n_embd=64, got 5"):
        spec_of_config({"model_type": "gpt2", **SMALL_GPT2, "n_head": 5}, "small")
    keys = {"model_type": "vit", "patch_size": 32, "image_size": 16, "num_attention_heads": 4, "hidden_size": 64}
    with pytest.raises(ConfigError, match="patch_size=32 must not exceed image_size=16"):
        spec_of_config({**keys, "intermediate_size": 96, "num_hidden_layers": 2}, "small")


@pytest.mark.parametrize("architecture", ["LlamaForTokenClassification", "LlamaForQuestionAnswering"])
def test_a_head_of_no_task_is_refused_unless_a_task_is_named(architecture):
    config = LlamaConfig(architectures=[architecture])
    with pytest.raises(ConfigError, match=f"names {architecture}, whose head is of none of the tasks .*--task"):
        spec_of_config(config.to_dict(), "m")
    with pytest.raises(ConfigError, match=f"names {architecture}"):
        build_spec(config)
    assert spec_of_config(config.to_dict(), "m", "causal_lm").task == "causal_lm"
    assert build_spec(for_task(config, "causal_lm")).task == "causal_lm"


@pytest.mark.parametrize("architecture", ["LlamaModel", "LlamaForPreTraining", "LlamaForConditionalGeneration"])
def test_without_a_head_of_its_own_the_type_says_the_task(architecture):
    assert spec_of_config(LlamaConfig(architectures=[architecture]).to_dict(), "m").task == "causal_lm"
