from __future__ import annotations

import json
from importlib.resources import files

import pytest

from galvatron.core.errors import ConfigError
from galvatron.estimate import CARDS, model_spec

BILLIONS = {  # published sizes
    "bert-large": 0.340,
    "deepseek-v3": 671,
    "gpt3-175b": 175,
    "llama2-13b": 13.0,
    "llama2-70b": 69.0,
    "llama2-7b": 6.74,
    "llama3.1-405b": 405.9,
    "llama3.1-70b": 70.6,
    "llama3.1-8b": 8.03,
    "mixtral-8x7b": 46.7,
    "qwen2.5-72b": 72.7,
    "qwen2.5-7b": 7.61,
    "qwen3-30b-a3b": 30.5,
    "swin-h": 1.016,
    "t5-3b": 2.85,
    "vit-h": 0.632,
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_has_as_many_parameters_as_published(name):
    assert model_spec(name).num_parameters == pytest.approx(BILLIONS[name] * 1e9, rel=0.02)


@pytest.mark.parametrize(("name", "billions"), [("mixtral-8x7b", 12.9), ("qwen3-30b-a3b", 3.3), ("deepseek-v3", 37)])
def test_a_token_meets_as_many_parameters_as_published(name, billions):
    spec = model_spec(name)
    ends = spec.embedding.num_parameters + spec.head.num_parameters
    active = ends + sum(kind.count * kind.active_parameters for kind in spec.layers)
    assert active == pytest.approx(billions * 1e9, rel=0.025)


def test_kinds_of_layers():
    kinds = {kind.name: kind for kind in model_spec("swin-h").layers}
    assert [kind.tokens(3136) for kind in kinds.values()] == [3136, 784, 196, 49]
    assert [kind.hidden_size for kind in kinds.values()] == [320, 640, 1280, 2560]
    t5 = model_spec("t5-3b")
    assert [kind.count for kind in t5.layers] == [1, 23, 1, 23]  # first layers have the table of scores' bias
    assert [(kind.side_inputs, kind.regions, kind.causal) for kind in t5.layers[1::2]] == [(0, 2, False), (1, 3, True)]
    (joint,) = t5.joints
    assert (joint.layer, joint.parameters, joint.table) == (24, ("encoder.final_layer_norm.weight",), True)
    kinds = model_spec("deepseek-v3").layers
    assert [(kind.count, kind.ffn_size, kind.num_experts, kind.head_dim) for kind in kinds] == [
        (3, 18432, 0, 160),
        (58, 2048, 256, 160),
    ]
    experts = [p for p in model_spec("mixtral-8x7b").layer.parameters if p.experts]
    assert [p.local_shape(2, ep=4) for p in experts] == [(2, 14336, 4096), (2, 4096, 7168)]


def test_names_in_any_case_and_paths(tmp_path):
    spec = model_spec("llama2-7b")
    assert model_spec("LLaMA2-7B") == spec
    folder = tmp_path / "mine"
    folder.mkdir()
    text = files("galvatron.estimate").joinpath("cards/llama2-7b.json").read_text()
    (folder / "config.json").write_text(text)
    for path in (folder, folder / "config.json"):
        assert model_spec(str(path)) == spec.model_copy(update={"name": "mine"})


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("meta-llama/Llama-3.1-8B", "llama3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-70B-Instruct", "llama3.1-70b"),
        ("llama-3.1-405b", "llama3.1-405b"),
        ("LLAMA_3.1_405B", "llama3.1-405b"),
        ("meta-llama/Llama-2-7b-hf", "llama2-7b"),
        ("meta-llama/Llama-2-13b-chat-hf", "llama2-13b"),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral-8x7b"),
        ("Qwen/Qwen2.5-72B-Instruct", "qwen2.5-72b"),
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("deepseek-ai/DeepSeek-V3", "deepseek-v3"),
        ("gpt-3-175b", "gpt3-175b"),
    ],
)
def test_names_of_the_hub(name, card):
    assert model_spec(name) == model_spec(card)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("llama3.1-8", r"'llama3.1-8' is no card, .*; did you mean 'llama3.1-8b'\? give a path or one of bert-large"),
        ("mistralai/Mixtral-8x22B-v0.1", "did you mean 'mixtral-8x7b'"),
        ("a\0b", "is no card"),
        ("x" * 5000, r"\.\.\. is no card"),
        ("", "'' is no card"),
    ],
)
def test_a_name_of_no_card_is_one_sentence(name, says):
    with pytest.raises(ConfigError, match=says):
        model_spec(name)


def test_what_is_neither_lists_the_cards(tmp_path):
    with pytest.raises(ConfigError, match=r"'llama9' is no card, .*bert-large, .*vit-h"):
        model_spec("llama9")
    with pytest.raises(ConfigError, match="no directory with one"):
        model_spec(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "says"), [("{", "is not JSON"), ("[]", "must be a JSON object"), ("{}", "model_type=None")]
)
def test_a_broken_file_is_named(tmp_path, text, says):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        model_spec(str(path))


def test_cards_hold_one_object_each():
    for name in CARDS:
        data = json.loads(files("galvatron.estimate").joinpath(f"cards/{name}.json").read_text())
        assert "model_type" in data
