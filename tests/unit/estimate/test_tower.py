"""What sees images of any size beside a language model: from the files of the hub, without torch."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PretrainedConfig
from typer.testing import CliRunner

from galvatron.cli import app
from galvatron.core.errors import ConfigError
from galvatron.core.model import ModelSpec, UnitSpec
from galvatron.estimate import estimate_model, model_spec, spec_of_config
from galvatron.estimate.compute import Rates
from galvatron.estimate.devices import preset
from galvatron.estimate.layer import matrices
from galvatron.estimate.tower import seen_by_tower, tower_bytes, tower_seconds
from galvatron.models import build_spec, meta_model
from galvatron.profile.activations import count_activations
from galvatron.profile.units import UnitShape

TEXT = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False, "image_token_id": 151655,
}  # fmt: skip
SEEN = {
    "depth": 32,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
HUB: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        **TEXT, "model_type": "qwen2_vl", "max_position_embeddings": 32768,
        "vision_config": {**SEEN, "embed_dim": 1280, "mlp_ratio": 4, "hidden_size": 3584},
    },
    "qwen2_5_vl": {
        **TEXT, "model_type": "qwen2_5_vl", "max_position_embeddings": 128000,
        "vision_config": {
            **SEEN, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
}  # fmt: skip
"""As Qwen/Qwen2-VL-7B and Qwen/Qwen2.5-VL-7B-Instruct have them: of the text flat, of what sees apart."""
PARAMETERS = {"qwen2_vl": 8_291_375_616, "qwen2_5_vl": 8_292_166_656}
"""As the hub counts them."""
SMALL_TEXT = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 200,
    "num_key_value_heads": 2, "layer_types": ["full_attention"] * 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
}  # fmt: skip
SMALL_SEEN = {"qwen2_vl": {"embed_dim": 256, "hidden_size": 128}, "qwen2_5_vl": {
    "hidden_size": 256, "intermediate_size": 680, "out_hidden_size": 128, "fullatt_block_indexes": [3],
}}  # fmt: skip
S = 512


def _small(model_type: str) -> PretrainedConfig:
    config = AutoConfig.for_model(model_type)
    tokens = {"image_token_id": 199, "video_token_id": 198, "vision_start_token_id": 197, "vision_end_token_id": 196}
    seen = {"depth": 4, "num_heads": 4, **SMALL_SEEN[model_type]}
    for part, values in ((config, tokens), (config.text_config, SMALL_TEXT), (config.vision_config, seen)):
        for name, value in values.items():
            setattr(part, name, value)
    return config


@pytest.mark.parametrize("model_type", HUB)
def test_files_of_the_hub_are_what_transformers_builds(model_type: str) -> None:
    spec = spec_of_config(HUB[model_type], "x")
    assert spec.num_parameters == PARAMETERS[model_type]
    assert spec == build_spec(AutoConfig.for_model(**HUB[model_type]), "x")


@pytest.mark.parametrize("model_type", HUB)
def test_flops_of_a_tower_are_what_torch_counts(model_type: str) -> None:
    config = _small(model_type)
    spec, visual = build_spec(config, "x"), meta_model(config).model.visual
    seen = seen_by_tower(spec, S)
    assert seen is not None
    assert (seen.tokens, seen.patches) == (256, 1024)
    side = math.isqrt(seen.patches)
    real = type(visual)._from_config(config.vision_config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        real(torch.randn(seen.patches, 3 * 2 * 14 * 14), grid_thw=torch.tensor([[1, side, side]]))
    products = 2 * seen.other_products
    for kind in seen.kinds:
        rows = sum(count * out * inner * share for count, out, inner, share in matrices(kind.parameters, 1))
        products += kind.count * seen.patches * (2 * rows + kind.attention_flops_per_token(seen.patches))
    assert products == pytest.approx(counter.get_total_flops(), rel=1e-6)


@pytest.mark.parametrize("model_type", HUB)
def test_a_tower_keeps_what_is_counted(model_type: str) -> None:
    config = _small(model_type)
    spec = build_spec(config, "x")
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        profile = estimate_model(spec, "h100", seq_len=S, precision=precision, tp_degrees=(1,))  # type: ignore[arg-type]
        kept = next(sample for sample in profile.activations if sample.unit == "embedding")
        counted = count_activations(UnitShape(config, spec, "embedding", 1, S, dtype), "none")
        assert kept.bytes_per_sequence == pytest.approx(counted.bytes_per_sequence, rel=0.1)


@pytest.mark.parametrize("model_type", [*HUB, "glm4v"])
@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"num_heads": 7}, r"num_heads .* must be a divisor of vision_config\.\w+=\d+, got 7; give"),
        ({"in_chans": 0}, "in_chans .* must be in_channels=3, by which the model is built, got 0; give"),
        ({"in_channels": 0}, "in_channels .* must be a positive integer, got 0; give"),
        ({"depth": 2**30}, "depth=1073741824 .* must be at most 16384; give"),
        ({"spatial_merge_size": 0}, "spatial_merge_size .* must be a positive integer, got 0; give"),
    ],
)
def test_a_tower_whose_sizes_contradict_is_one_sentence(model_type: str, keys: dict[str, Any], says: str) -> None:
    config = HUB.get(model_type, {"model_type": model_type})
    spec_of_config(config, "x")
    with pytest.raises(ConfigError, match=says) as caught:
        spec_of_config({**config, "vision_config": {**config.get("vision_config", {}), **keys}}, "x")
    assert model_type in str(caught.value) or "nested" in str(caught.value)


@pytest.mark.parametrize(("model_type", "key"), [("qwen2_vl", "hidden_size"), ("glm4v", "out_hidden_size")])
def test_a_tower_gives_what_the_text_takes(model_type: str, key: str) -> None:
    config = HUB.get(model_type, {"model_type": model_type})
    with pytest.raises(ConfigError, match=rf"{key} of .* must be the \d+ of the text's hidden_size, got 17; give"):
        spec_of_config({**config, "vision_config": {**config.get("vision_config", {}), key: 17}}, "x")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"window_size": -112}, "window_size .* must be a positive integer, got -112"),
        ({"window_size": 1}, r"window_size .* must be a multiple of 28 \(.*patch_size=14 times .*=2\), got 1;"),
        ({"spatial_merge_size": 3}, r"window_size .* must be a multiple of 42 \(.*\), got 112;"),
        ({"window_size": "112"}, "window_size .* must be a positive integer, got '112'"),
        ({"fullatt_block_indexes": "all"}, "must be a list of different layers from 0 to 31, got 'all'"),
        ({"fullatt_block_indexes": [99]}, r"must be a list of different layers from 0 to 31, got \[99\]"),
        ({"fullatt_block_indexes": [7, 7]}, r"must be a list of different layers from 0 to 31, got \[7, 7\]"),
        ({"fullatt_block_indexes": [True]}, r"must be a list of different layers from 0 to 31, got \[True\]"),
        ({"out_hidden_size": 17}, "out_hidden_size .* must be the 3584 of the text's hidden_size, got 17"),
    ],
)
def test_windows_that_are_none_plan_nothing(tmp_path: Any, keys: dict[str, Any], says: str) -> None:
    config = HUB["qwen2_5_vl"]
    file, out = tmp_path / "config.json", tmp_path / "plan.json"
    file.write_text(json.dumps({**config, "vision_config": {**config["vision_config"], **keys}}))
    with pytest.raises(ConfigError, match=says) as caught:
        model_spec(str(file))
    assert "\n" not in str(caught.value)
    options = ["--cluster", "h100:1x8", "--seq-len", "2048", "--global-batch-size", "8", "--out", str(out)]
    assert CliRunner().invoke(app, ["search", "--model", str(file), *options]).exit_code != 0
    assert not out.exists()


def _frozen(spec: ModelSpec) -> ModelSpec:
    frozen = tuple(p.model_copy(update={"trainable": False}) for p in spec.embedding.parameters)
    return spec.model_copy(update={"embedding": UnitSpec(parameters=frozen)})


def test_a_frozen_tower_runs_forward_and_keeps_nothing() -> None:
    spec, rates = spec_of_config(HUB["qwen2_vl"], "x"), Rates.of(preset("h100"), "bf16")
    frozen = _frozen(spec)
    assert tower_bytes(frozen, 4096, "bf16") == (0.0, 0.0)
    forward_s, backward_s = tower_seconds(frozen, 1, 4096, rates)
    assert (forward_s, backward_s) == (tower_seconds(spec, 1, 4096, rates)[0], 0.0)


def test_the_search_says_what_images_it_assumes(tmp_path: Any) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(HUB["qwen2_5_vl"]))
    options = ["--cluster", "h100:1x8", "--seq-len", "2048", "--global-batch-size", "8", "--fix", "pp=1"]
    shown = CliRunner().invoke(app, ["search", "--model", str(file), *options, "--out", str(tmp_path / "plan.json")])
    assert shown.exit_code == 0, shown.output
    assert "Images: one square one a text is assumed, for which 1,024 of 2,048 tokens stand" in shown.output
