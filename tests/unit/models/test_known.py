"""What ships of a type is what transformers builds of it, for every size."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from galvatron.cli import app
from galvatron.core.compact import WIDTH
from galvatron.core.errors import ConfigError
from galvatron.core.known import FOLDER, KnownFamily, known_families
from galvatron.estimate import spec_of_config
from galvatron.models import build_spec, family_of, for_task, structure_key
from galvatron.models.describe import describe
from galvatron.models.recognise import recognise
from galvatron.models.types import usual_config
from galvatron.testing.models import VARIANTS, tiny_config

DOCS = Path(__file__).parents[3] / "docs" / "models.md"


CUT_OTHERWISE = ("cohere-head-norms",)  # than their type's own config
SHIPPED = {v.name: v.config() for v in VARIANTS if v.name not in CUT_OTHERWISE and v.family in known_families()}
SHIPPED["deepseek_v3"] = tiny_config("deepseek_v3")
SHIPPED["deepseek_v3 with experts alone"] = tiny_config("deepseek_v3", first_k_dense_replace=0)


@pytest.mark.parametrize("name", SHIPPED)
def test_shapes_by_formula_are_those_of_the_model(name: str) -> None:
    config = SHIPPED[name]
    spec = build_spec(config, "x")
    assert spec_of_config(config.to_dict(), "x") == spec
    assert spec_of_config({"model_type": config.model_type, **config.to_diff_dict()}, "x") == spec


@pytest.mark.parametrize("name", known_families())
def test_what_ships_is_proved_of_the_type_as_it_is(name: str) -> None:
    """Its configuration may have other keys in another version, and everybody would prove it anew."""
    known = known_families()[name]
    assert structure_key(for_task(usual_config(known.family.model_type), known.family.task)) in known.proved


MADE_AGAIN = ("clip",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in MADE_AGAIN else pytest.mark.slow) for n in known_families()]
)
def test_what_ships_is_what_the_command_makes(name: str) -> None:
    known = known_families()[name]
    config = for_task(usual_config(known.family.model_type), known.family.task)
    assert describe(config, known.proved) == known


def test_a_size_is_read_by_the_name_of_a_file_or_by_ours() -> None:
    """Qwen3-MoE's files count num_experts, which transformers calls num_local_experts."""
    config = tiny_config("qwen3_moe").to_dict()
    config["num_experts"] = config.pop("num_local_experts")
    assert spec_of_config(config, "x") == build_spec(tiny_config("qwen3_moe"), "x")


@pytest.mark.parametrize("name", [name for name, known in known_families().items() if known.family.ends == "whole"])
def test_shapes_of_whole_ends_and_every_task_are_those_of_the_model(name: str) -> None:
    """By the architecture that a file names, and by the task that is asked for."""
    family = known_families()[name].family
    config = AutoConfig.for_model(family.model_type)
    for depth in {"num_hidden_layers", "decoder_layers"} & {*config.to_dict(), *config.attribute_map}:
        setattr(config, depth, 3)
    if family.task == "text_classification":
        config.pad_token_id, config.num_labels = 1, 7
    if family.tower is not None:  # the types' own defaults do not fit each other
        width = "out_hidden_size" if hasattr(config.vision_config, "out_hidden_size") else "hidden_size"
        setattr(config.vision_config, width, config.text_config.hidden_size)
    named = for_task(config, family.task)
    assert spec_of_config(named.to_dict(), "x") == build_spec(named, "x")
    assert spec_of_config(config.to_dict(), "x", family.task) == build_spec(named, "x")


def test_a_task_without_shapes_is_refused() -> None:
    config = {**tiny_config("vit").to_dict(), "architectures": ["ViTForMaskedLM"]}
    with pytest.raises(ConfigError, match="task=masked_lm of a vit config has no shapes here, only image_class"):
        spec_of_config(config, "x")


def test_a_classifier_of_texts_needs_a_padding_token() -> None:
    config = for_task(tiny_config("llama"), "text_classification")
    config.pad_token_id = None
    with pytest.raises(ConfigError, match="a llama that classifies texts finds their last token by pad_token_id"):
        build_spec(config)


def test_positions_begin_after_that_of_padding() -> None:
    config = tiny_config("roberta", pad_token_id=1, max_position_embeddings=66)
    assert build_spec(config).max_seq_len == 64


@pytest.mark.parametrize("model_type", ["phi3", "opt"])
def test_data_says_what_recognition_finds(model_type: str) -> None:
    config = tiny_config(model_type)
    assert structure_key(config) in known_families()[model_type].proved
    assert recognise(config) == known_families()[model_type].family


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("granite", "logits_scaling", 4.0),  # as many as layers
        ("granite", "logits_scaling", 2),  # as many as heads of keys
        ("gemma2", "final_logit_softcapping", 2.0),
        ("gemma2", "final_logit_softcapping", 50.0),  # as attn_logit_softcapping is
    ],
)
def test_what_logits_are_scaled_by_is_told_from_a_size_as_large(model_type: str, key: str, value: float) -> None:
    assert recognise(tiny_config(model_type, **{key: value})).logits == known_families()[model_type].family.logits


@pytest.mark.parametrize("model_type", ["gemma2", "modernbert", "smollm3"])
def test_a_list_of_one_layer_is_a_list_of_layers(model_type: str) -> None:
    config = tiny_config(model_type, num_hidden_layers=1)
    assert recognise(config).stacks[0].regions == known_families()[model_type].family.stacks[0].regions


def test_what_is_cut_otherwise_is_not_among_what_is_proved() -> None:
    """Proved by cuts of its own, it would be cut as the type's own config is, without another proof."""
    with_norms = tiny_config("cohere", use_qk_norm=True)
    assert family_of(with_norms).stacks[0].regions[0].by_head.keys() == {"self_attn.q_norm", "self_attn.k_norm"}
    assert structure_key(with_norms) not in known_families()["cohere"].proved


def test_a_flag_whose_shapes_do_not_ship_is_refused() -> None:
    config = {**tiny_config("opt").to_dict(), "do_layer_norm_before": False}
    with pytest.raises(ConfigError, match="do_layer_norm_before=False of a opt config has no shapes here"):
        spec_of_config(config, "x")
    config = tiny_config("cohere", use_qk_norm=True).to_dict()
    with pytest.raises(ConfigError, match="use_qk_norm=True of a cohere config has no shapes here; profile the model"):
        spec_of_config(config, "x")


def test_widths_of_heads_that_a_type_leaves_open() -> None:
    """Qwen3-30B-A3B: 32 heads of 128 in a model of 2,048."""
    for model_type in ("qwen3_moe", "mixtral", "olmo2"):
        config = tiny_config(model_type)
        config.head_dim = 2 * config.hidden_size // config.num_attention_heads
        assert spec_of_config(config.to_dict(), "x") == build_spec(config, "x")


def test_what_follows_from_other_sizes_of_a_part_does() -> None:
    """LLaVA 1.5 13B: its language model counts no heads of keys and values."""
    text = {"model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40}
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "patch_size": 14}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 24, "image_size": 336}
    config = {"model_type": "llava", "text_config": text, "vision_config": vision}
    kind = spec_of_config(config, "x").layers[-1]
    assert (kind.num_kv_heads, kind.head_dim) == (40, 128)


def test_what_a_family_costs_in_lines() -> None:
    """As the command writes it, in lines of a page; the documentation says how many."""
    texts = {path: path.read_text() for path in FOLDER.glob("*.json")}
    assert all(KnownFamily.load(path).to_json() == text for path, text in texts.items())
    assert max(len(line) for text in texts.values() for line in text.splitlines()) <= WIDTH
    lines = sorted(text.count("\n") for text in texts.values())
    assert statistics.median(lines) <= 25
    assert f"({statistics.median(lines):.0f} lines in the median, {lines[0]} to {lines[-1]})" in DOCS.read_text()


def test_the_table_of_the_docs_is_the_commands() -> None:
    shown = CliRunner().invoke(app, ["models", "list", "--markdown"])
    assert shown.exit_code == 0
    assert shown.output in DOCS.read_text()


def test_the_list_has_a_heading_and_fits_a_page() -> None:
    lines = CliRunner().invoke(app, ["models", "list"]).output.splitlines()
    heading, *rows, basis = (line for line in lines if line[:1].isalpha())
    assert re.split(" {2,}", heading.strip()) == ["type", "task", "attention", "MLP", "outside the layers"]
    families = [known.family for known in known_families().values()]
    assert [row.split()[:2] for row in rows] == [[family.model_type, family.task] for family in families]
    assert max(map(len, lines)) <= 100
    assert not any("…" in line for line in lines)
    assert "proved with transformers 5." in basis


def test_check_says_what_is_alike_once_and_nothing_of_what_is_not_there() -> None:
    said = CliRunner().invoke(app, ["models", "check", "swin"]).output
    assert "None" not in said
    assert said.count("mlp.fc1 by ffn") == said.count("attention.q_proj by heads") == 1
    assert "embedding" not in said.replace("swin.embeddings", "")


def test_check_says_what_is_found_and_fails_for_what_is_wrong() -> None:
    right = CliRunner().invoke(app, ["models", "check", "starcoder2"])
    assert right.exit_code == 0
    assert "self_attn.k_proj by kv_heads" in right.output
    wrong = CliRunner().invoke(app, ["models", "check", "openai-gpt"])
    assert wrong.exit_code == 2
    assert "openai-gpt: refused" in wrong.output
    assert "has no stack of equal layers" in " ".join(wrong.output.split())
