"""Types that each show one general rule of recognition."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from galvatron.core.errors import PlanError
from galvatron.models import family_of, meta_model, spec_of, twin_config
from galvatron.parallelize.proof import Proof, prove
from galvatron.plan import LayerStrategy, Plan


def test_what_latent_attention_is_made_from_stays_whole_and_layers_may_be_dense_or_of_experts() -> None:
    config = AutoConfig.for_model("deepseek_v3")
    (stack,) = family_of(config).stacks
    attention, *mlps = stack.regions
    assert attention.columns == {"self_attn.q_b_proj": ("heads",), "self_attn.kv_b_proj": ("heads",)}
    assert [region.row for region in mlps] == ["mlp.down_proj", "mlp.shared_experts.down_proj"]
    kinds = spec_of(meta_model(twin_config(config))).layers
    assert [kind.num_experts for kind in kinds] == [0, 4]
    assert prove(config) == Proof()


def test_a_gate_that_feeds_no_row_stays_whole() -> None:
    config = AutoConfig.for_model("qwen2_moe")
    columns = [name for region in family_of(config).stacks[0].regions for name in region.columns]
    assert "mlp.shared_expert.gate_proj" in columns
    assert "mlp.shared_expert_gate" not in columns
    assert prove(config) == Proof()


def test_layers_with_an_attention_of_their_own_run_whole_sequences() -> None:
    config = AutoConfig.for_model("falcon")
    family = family_of(config)
    assert (family.asks_for_attention, family.ends) == (False, "whole")
    assert prove(config).whole is None
    spec = spec_of(meta_model(twin_config(config)))
    plan = Plan(
        model="tiny",
        world_size=2,
        layers_per_stage=(4,),
        global_batch_size=2,
        seq_len=16,
        embedding=LayerStrategy(dp_replicate=2),
        layers=(LayerStrategy(ulysses=2),) * 4,
        head=LayerStrategy(dp_replicate=2),
    )
    with pytest.raises(PlanError, match="ulysses=2 needs layers whose attention can be replaced"):
        plan.validate(spec, 2)


def test_decoders_whose_ends_are_more_than_a_table_a_norm_and_a_linear_run_them_whole() -> None:
    config = AutoConfig.for_model("bert-generation")
    assert family_of(config).ends == "whole"
    assert prove(config) == Proof()
