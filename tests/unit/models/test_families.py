"""Families: configs are described without being built, and initial weights depend on nothing but the seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from galvatron.core.errors import ConfigError
from galvatron.models import InitialWeights, auto_class, build_spec, load_config, meta_model
from galvatron.testing.models import FAMILIES, tiny_config, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_spec_counts_what_the_model_has(family: str) -> None:
    config = tiny_config(family)
    spec, model = build_spec(config), tiny_model(family)
    assert spec.num_parameters == sum(p.numel() for p in model.parameters())
    assert spec.num_layers == config.num_hidden_layers
    assert {p.name for p in spec.layer.parameters} == {
        n.split(".0.", 1)[1] for n, _ in model.named_parameters() if ".0." in n
    }


def test_gpt2_fuses_three_segments_and_llama_keeps_few_kv_heads_whole() -> None:
    fused = next(p for p in build_spec(tiny_config("gpt2")).layer.parameters if p.name == "attn.c_attn.weight")
    assert fused.cut is not None
    assert fused.cut.ranges(96, 2, 1) == [(16, 32), (48, 64), (80, 96)]
    key = next(p for p in build_spec(tiny_config("llama")).layer.parameters if p.name == "self_attn.k_proj.weight")
    assert key.local_shape(4) == key.shape


@pytest.mark.parametrize("family", FAMILIES)
def test_meta_models_take_no_memory_and_keep_ties_and_buffers(family: str) -> None:
    model = meta_model(tiny_config(family))
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == model.config.tie_word_embeddings


def test_initial_weights_follow_hugging_face_and_the_name_alone() -> None:
    config = tiny_config("gpt2", n_embd=64, n_layer=2)
    weights = InitialWeights(meta_model(config), seed=3)
    name, shape = "transformer.h.1.mlp.c_proj.weight", (256, 64)
    whole = weights.read(name, (0, 0), shape)
    # GPT-2 scales residual projections by 1/sqrt(2 · layers)
    assert float(whole.std()) == pytest.approx(0.02 / 2, rel=0.05)
    assert torch.equal(weights.read(name, (8, 16), (4, 5)), whole[8:12, 16:21])
    assert torch.equal(InitialWeights(meta_model(config), seed=3).read(name, (0, 0), shape), whole)
    assert not torch.equal(InitialWeights(meta_model(config), seed=4).read(name, (0, 0), shape), whole)
    assert not torch.equal(weights.read("transformer.h.0.mlp.c_proj.weight", (0, 0), shape), whole)
    assert torch.equal(weights.read("transformer.h.0.ln_1.weight", (0,), (64,)), torch.ones(64))


@pytest.mark.parametrize("family", ["clip", "siglip", "vit", "dinov2", "modernbert", "t5", "bart", "gpt2"])
def test_initial_weights_are_drawn_as_hugging_face_draws_them(family: str) -> None:
    """Those too that torch does not draw on meta (truncated normals), or that a module is made with (scales)."""
    config = tiny_config(family)
    weights = InitialWeights(meta_model(config), seed=3)
    for name, parameter in auto_class(config).from_config(config).requires_grad_(False).named_parameters():
        shape = tuple(parameter.shape)
        ours = weights.read(name, (0,) * len(shape), shape)
        if parameter.numel() == 1 or float(parameter.std()) == 0:
            assert torch.equal(ours, parameter), name
        else:
            spread = 6 / parameter.numel() ** 0.5
            assert float(ours.std()) == pytest.approx(float(parameter.std()), rel=spread), name


def test_a_value_that_a_model_on_meta_has_lost_is_refused() -> None:
    with torch.device("meta"):
        model = auto_class(config := tiny_config("clip")).from_config(config)
    with pytest.raises(ConfigError, match="CLIPModel gives logit_scale no initial value but when it is made"):
        InitialWeights(model, seed=0).read("logit_scale", (), ())


def test_a_padding_row_starts_at_zero() -> None:
    weights = InitialWeights(meta_model(tiny_config("llama", pad_token_id=3)), seed=0)
    row = weights.read("model.embed_tokens.weight", (2, 0), (2, 32))
    assert row[0].abs().sum() > 0
    assert row[1].abs().sum() == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "albert"}', "model_type='albert' "),
        ('{"hidden_size": 3}', "lacks model_type"),
        ("{", "is not JSON"),
    ],
)
def test_what_is_no_supported_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="has no readable config"):
        load_config(tmp_path / "absent")


def test_a_config_loads_from_a_file_and_from_a_directory(tmp_path: Path) -> None:
    tiny_config("qwen3").save_pretrained(tmp_path)
    assert load_config(tmp_path).hidden_size == 32
    assert load_config(tmp_path / "config.json").model_type == "qwen3"
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen3"


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"num_hidden_layers": 10**12}, "a model has 1 to 16,384 layers, got 1000000000000"),
        ({"num_hidden_layers": 0}, "a model has 1 to 16,384 layers, got 0"),
        ({"hidden_size": 2**62}, "transformers cannot build the llama that its config describes"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"model_type": 5}, "lacks model_type"),
    ],
)
@pytest.mark.parametrize("in_a_folder", [False, True])
def test_sizes_that_make_no_model_are_one_sentence(
    tmp_path: Path, keys: dict[str, object], says: str, in_a_folder: bool
) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"model_type": "llama", "vocab_size": 131, "intermediate_size": 96, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps({**config, **sizes, **keys}))
    with pytest.raises(ConfigError, match=says) as caught:
        build_spec(load_config(tmp_path if in_a_folder else tmp_path / "config.json"))
    assert "\n" not in str(caught.value)


def test_initial_values_that_a_type_computes_are_refused_before_anything_is_made() -> None:
    config = AutoConfig.for_model("mamba", vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(ConfigError, match=r"the initial value of .*A_log is computed by MambaForCausalLM itself"):
        InitialWeights(meta_model(config), 0)
