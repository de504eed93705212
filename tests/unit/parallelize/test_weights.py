"""Foreign weights: right, or refused by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from galvatron.core.errors import CheckpointError, ConfigError
from galvatron.parallelize.checks.model import check_model
from galvatron.parallelize.state.pieces import LocalParameter, Piece
from galvatron.parallelize.state.weights import (
    CompletedWeights,
    SafetensorsWeights,
    StateDictWeights,
    check_names,
    fill,
)
from galvatron.testing.models import tiny_model

NAME = "model.layers.3.mlp.down_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def saved(directory: Path, *, tied: bool = False, **changes: torch.Tensor | None) -> SafetensorsWeights:
    """A tiny LLaMA's directory with some tensors of the file replaced, added or (None) removed."""
    tiny_model("llama", tie_word_embeddings=tied).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors")
    return SafetensorsWeights(directory, base_prefix="model")


def parameter(name: str, shape: tuple[int, ...]) -> LocalParameter:
    """All of a parameter, on one rank."""
    zeros = (0,) * len(shape)
    return LocalParameter(name, torch.nn.Parameter(torch.empty(shape)), shape, (Piece(zeros, zeros, shape),), 1, True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_of_any_width_are_taken_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(32, 48).to(dtype)
    part = parameter(NAME, (32, 48))
    fill([part], saved(tmp_path, **{NAME: values}))
    assert torch.equal(part.tensor, values.float())


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int32", "bool"])
def test_other_kinds_of_numbers_are_refused(tmp_path: Path, dtype: str) -> None:
    values = torch.ones(32, 48).to(getattr(torch, dtype))
    for weights in (saved(tmp_path, **{NAME: values}), StateDictWeights({NAME: values})):
        with pytest.raises(CheckpointError, match=f"weights of {NAME} are {dtype}, which mean something only with"):
            fill([parameter(NAME, (32, 48))], weights)


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "gptq"])
def test_a_quantisation_in_the_config_is_refused_before_any_tensor_is_read(tmp_path: Path, method: str) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"holds weights quantised by {method} .quantization_config in its"):
        SafetensorsWeights(tmp_path)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_is_named_with_its_tensor(tmp_path: Path, bad: float) -> None:
    values = torch.randn(32, 48)
    values[31, 47] = bad
    with pytest.raises(CheckpointError, match=f"weights of {NAME} hold NaN or inf"):
        fill([parameter(NAME, (32, 48))], saved(tmp_path, **{NAME: values}))
    too_large = torch.full((32, 48), 1e300, dtype=torch.float64)
    with pytest.raises(CheckpointError, match=f"weights of {NAME} hold NaN or inf"):
        fill([parameter(NAME, (32, 48))], StateDictWeights({NAME: too_large}))


def test_tensors_that_the_model_lacks_are_counted_in_one_warning(tmp_path: Path) -> None:
    extra = {f"model.layers.{layer}.self_attn.q_proj.bias": torch.zeros(32) for layer in range(4)}
    extra["model.layers.4.input_layernorm.weight"] = torch.ones(32)
    weights = saved(tmp_path, **extra)
    with pytest.warns(UserWarning, match="left out") as caught:
        check_names(weights, tiny_model("llama"), {})
    (warning,) = caught
    assert str(warning.message) == (
        f"{tmp_path} holds 5 tensors that the model lacks and that are left out: "
        "model.layers.0.self_attn.q_proj.bias, model.layers.1.self_attn.q_proj.bias, "
        "model.layers.2.self_attn.q_proj.bias, ..."
    )


def test_what_the_model_computes_itself_is_no_news(tmp_path: Path) -> None:
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(4)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_names(saved(tmp_path, **old), tiny_model("llama"), {})
        model = tiny_model("gpt2")
        state = {name.removeprefix("transformer."): t.detach() for name, t in model.named_parameters()}
        mask = {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)}
        (tmp_path / "hub").mkdir()
        save_file({**state, **mask}, tmp_path / "hub" / "model.safetensors")
        check_names(SafetensorsWeights(tmp_path / "hub", base_prefix="transformer"), model, {})


def test_what_lacks_is_counted_and_named(tmp_path: Path) -> None:
    weights = saved(tmp_path, **{NAME: None, HEAD: None})
    with pytest.raises(CheckpointError, match=rf"lacks 2 of the model's 39 parameters: {NAME}, {HEAD}; give"):
        check_names(weights, tiny_model("llama"), {})
    with pytest.raises(CheckpointError, match=r"the state dict lacks 39 of the model's 39 parameters: model\.embed"):
        check_names(StateDictWeights({}), tiny_model("llama"), {})


def test_a_tied_head_of_its_own_values_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    table = model.get_parameter(EMBEDDING).detach()
    part = parameter(EMBEDDING, (97, 32))
    same = saved(tmp_path, tied=True, **{HEAD: table.clone()})
    twins = check_names(same, model, {EMBEDDING: HEAD})
    assert twins == {EMBEDDING: HEAD}
    fill([part], same, twins)
    other = saved(tmp_path, tied=True, **{HEAD: table + 1e-3})
    with pytest.raises(CheckpointError, match=rf"weights of {HEAD} differ from those of {EMBEDDING}, to which"):
        fill([part], other, check_names(other, model, {EMBEDDING: HEAD}))
    alone = saved(tmp_path, tied=True)
    assert check_names(alone, model, {EMBEDDING: HEAD}) == {}


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": {"a": 3}}', '{"weight_map": []}'])
def test_an_index_that_is_none_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        SafetensorsWeights(tmp_path)


def test_a_tensor_that_the_index_has_and_the_file_has_not_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    index = {"weight_map": {"model.other": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.safetensors has no model\.other that can be read"):
        SafetensorsWeights(tmp_path).shape("model.other")


def test_adapters_come_from_elsewhere_where_weights_lack_them() -> None:
    base, adapter, own = torch.zeros(4, 2), torch.ones(3, 2), torch.full((3, 2), 2.0)
    names = "q.base_layer.weight", "q.lora_A.default.weight"
    plain = CompletedWeights(StateDictWeights({"q.weight": base}), StateDictWeights({names[1]: own}))
    assert [plain.find(name) for name in (*names, "k.weight")] == ["q.weight", names[1], None]
    assert [plain.shape(name) for name in names] == [(4, 2), (3, 2)]
    assert torch.equal(plain.read(names[1], (1, 0), (2, 2)), own[1:])
    whole = CompletedWeights(StateDictWeights({names[0]: base, names[1]: adapter}), StateDictWeights({names[1]: own}))
    assert [whole.find(name) for name in names] == list(names)
    assert torch.equal(whole.read(names[1], (0, 0), (3, 2)), adapter)


def test_what_is_added_after_the_head_must_be_zero(tmp_path: Path) -> None:
    model = tiny_model("bart")
    model.save_pretrained(tmp_path)
    check_names(SafetensorsWeights(tmp_path), model, {})
    model.final_logits_bias[0, 3] = 1.0
    given = StateDictWeights(model.state_dict())
    with pytest.raises(CheckpointError, match=r"final_logits_bias of .* is not zero: it is added to logits"):
        check_names(given, tiny_model("bart"), {})
    with pytest.raises(ConfigError, match="final_logits_bias is not zero"):
        check_model(model)
    with pytest.raises(ConfigError, match="buffer final_logits_bias is on meta"):
        check_model(tiny_model("bart").to("meta"))
