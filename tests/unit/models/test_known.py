"""What ships of a type is what transformers builds of it, for every size."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from galvatron.cli import app
from galvatron.core.errors import ConfigError
from galvatron.core.family import known_families
from galvatron.estimate import spec_of_config
from galvatron.models import build_spec, family_of, structure_key
from galvatron.models.recognise import recognise
from galvatron.testing.models import VARIANTS, tiny_config

DOCS = Path(__file__).parents[3] / "docs" / "models.md"


CUT_OTHERWISE = ("cohere-head-norms",)  # than their type's own config
SHIPPED = [v for v in VARIANTS if v.name not in CUT_OTHERWISE and v.family in known_families()]


@pytest.mark.parametrize("variant", SHIPPED, ids=lambda v: v.name)
def test_shapes_by_formula_are_those_of_the_model(variant) -> None:
    config = variant.config()
    assert spec_of_config(config.to_dict(), "x") == build_spec(config, "x")


@pytest.mark.parametrize("model_type", ["phi3", "opt"])
def test_data_says_what_recognition_finds(model_type: str) -> None:
    config = tiny_config(model_type)
    assert structure_key(config) in known_families()[model_type].proved
    assert recognise(config) == known_families()[model_type].family


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


def test_the_table_of_the_docs_is_the_commands() -> None:
    shown = CliRunner().invoke(app, ["models", "list", "--markdown"])
    assert shown.exit_code == 0
    assert shown.output in DOCS.read_text()


def test_check_says_what_is_found_and_fails_for_what_is_wrong() -> None:
    right = CliRunner().invoke(app, ["models", "check", "starcoder2"])
    assert right.exit_code == 0
    assert "self_attn.k_proj by kv_heads" in right.output
    wrong = CliRunner().invoke(app, ["models", "check", "mamba"])
    assert wrong.exit_code == 1
    assert "mamba: refused" in wrong.output
    assert "is described in no way that is known" in " ".join(wrong.output.split())
