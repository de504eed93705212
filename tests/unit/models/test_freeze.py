"""Frozen parameters: by pattern, as kinds of layers, and what a pass over them costs."""

from __future__ import annotations

import pytest

from galvatron.core.errors import ConfigError
from galvatron.core.model import UnitSpec
from galvatron.models import build_spec, freeze_parameters, meta_model, spec_of
from galvatron.testing.models import tiny_config

LOWER = ("model.embed_tokens.*", "model.layers.[01].*")


def test_layers_that_train_alike_are_of_one_kind() -> None:
    spec = build_spec(tiny_config("llama"), freeze=LOWER)
    assert [(kind.name, kind.count, kind.trained_share) for kind in spec.layers] == [
        ("layers 0-1", 2, 0.0),
        ("layers 2-3", 2, 1.0),
    ]
    assert not spec.embedding.parameters[0].trainable
    assert all(p.trainable for p in spec.head.parameters)
    assert [spec.is_reached(unit) for unit in spec.units] == [False, False, True, True]
    assert [spec.trains_before(layer) for layer in range(5)] == [False, False, False, True, True]


def test_frozen_norms_alone_leave_one_kind() -> None:
    spec = build_spec(tiny_config("llama"), freeze=["*norm*"])
    (kind,) = spec.layers
    assert kind.name == "layer"
    assert [p.name for p in kind.parameters if not p.trainable] == [
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    ]
    assert 0.98 < kind.trained_share < 1


def test_a_tied_weight_is_frozen_at_both_ends() -> None:
    spec = build_spec(tiny_config("gpt2"), freeze=["transformer.wte.weight"])
    ends = [p.trainable for p in (*spec.embedding.parameters, *spec.head.parameters)]
    assert ends == [False, True, True, True, False]  # wte, wpe, ln_f's two, the head
    assert spec.is_reached("embedding")


def test_flops_leave_out_gradients_that_nobody_needs() -> None:
    config = tiny_config("llama")
    whole, lower = build_spec(config), build_spec(config, freeze=LOWER)
    upper = build_spec(config, freeze=["model.layers.[23].*"])
    head = 6 * 97 * 32
    layers = whole.flops_per_token(16) - head
    assert lower.flops_per_token(16) - head == pytest.approx(layers * (1 / 2 + 1 / 2 / 3))  # a forward alone below
    without_weights = 2 * 2 * whole.layer.num_parameters
    assert upper.flops_per_token(16) - head == pytest.approx(layers - without_weights)


def test_patterns_that_match_nothing_name_what_is_near() -> None:
    model = meta_model(tiny_config("llama"))
    with pytest.raises(ConfigError, match=r"'model\.layer\.0\.\*' matches no parameter .* are model\.layers\.0"):
        freeze_parameters(model, ["model.layer.0.*"])
    with pytest.raises(ConfigError, match="every parameter of the model is frozen"):
        freeze_parameters(model, ["*"])


def test_a_specification_reads_what_the_model_requires() -> None:
    model = meta_model(tiny_config("llama"))
    freeze_parameters(model, LOWER)
    assert spec_of(model, "x") == build_spec(tiny_config("llama"), "x", LOWER)


def test_a_head_without_parameters_counts_as_trained() -> None:
    whole = build_spec(tiny_config("llama"))
    bare = whole.model_copy(update={"head": UnitSpec(parameters=())})
    assert bare.flops_per_token(16) == whole.flops_per_token(16)
