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
    decoder = model_spec("t5-3b").kind("decoder")
    assert (decoder.side_inputs, decoder.regions, decoder.causal) == (1, 3, True)
    assert not model_spec("t5-3b").kind("encoder").causal
    assert [kind.count for kind in model_spec("deepseek-v3").layers] == [3, 58]
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
