"""Types that each show one general rule of recognition."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from galvatron.core.errors import ConfigError, PlanError, UnfitError
from galvatron.models import build_spec, family_of, meta_model, spec_of, structure_key, twin_config
from galvatron.models.types import usual_config
from galvatron.parallelize.proof import Finding, Proof, prove
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


@pytest.mark.parametrize(
    ("model_type", "flags", "layout"),
    [
        ("gpt_bigcode", {}, ("heads", "kv_head", "kv_head")),
        ("falcon", {}, ("heads", "kv_head", "kv_head")),
        ("falcon", {"new_decoder_architecture": True}, ("kv_heads",)),
        ("falcon", {"multi_query": False}, ("heads",)),
    ],
)
def test_one_matrix_of_queries_keys_and_values_is_cut_whatever_the_order_in_it(
    model_type: str, flags: dict[str, bool], layout: tuple[str, ...]
) -> None:
    config = AutoConfig.for_model(model_type, **flags)
    (columns, *_) = (region.columns for region in family_of(config).stacks[0].regions)
    assert tuple(columns.values()) == (layout,)
    assert prove(config) == Proof()
    kind = spec_of(meta_model(twin_config(config))).layers[0]
    assert kind.num_kv_heads == {"kv_head": 1, "kv_heads": 2, "heads": 4}[layout[-1]]


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


def test_a_type_is_completed_where_its_own_config_leaves_sizes_open() -> None:
    assert AutoConfig.for_model("hunyuan_v1_dense").head_dim is None
    config = usual_config("hunyuan_v1_dense")
    assert config.head_dim == config.hidden_size // config.num_attention_heads
    assert prove(config) == Proof()
    assert usual_config("llama").to_dict() == AutoConfig.for_model("llama").to_dict()


def test_kinds_of_layers_that_a_config_leaves_open_are_those_of_attention() -> None:
    assert AutoConfig.for_model("lfm2_moe").layer_types is None
    assert prove(usual_config("lfm2_moe")) == Proof()


def test_states_that_are_changed_between_layers_are_whole_there_and_in_one_stage() -> None:
    """Qwen3-VL adds what its tower came to after earlier layers."""
    config = AutoConfig.for_model("qwen3_vl")
    (stack,) = family_of(config).stacks
    assert (stack.path, stack.recorded) == ("model.language_model.layers", True)
    proof = prove(config)
    assert (proof.whole, proof.tp) == (None, None)
    assert proof.pp is not None
    assert proof.pp.kind == "differs"
    assert "the loss is" in proof.pp.detail


def test_parameters_that_a_task_does_not_use_are_held_and_not_trained() -> None:
    config = AutoConfig.for_model("luke")
    unused = family_of(config).unused
    assert "luke.entity_embeddings.entity_embeddings.weight" in unused
    head = spec_of(meta_model(twin_config(config))).head.parameters
    assert {p.name for p in head if not p.trainable} == set(unused)
    assert prove(config) == Proof()


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("minicpmv4_6", "does not look at pixel_values without further inputs beside them"),
        ("mobilebert", "multiplies by cls.predictions.dense.weight outside of the module that has it"),
        ("resnet", "has no image_size in its config: it takes images of any size, or patches"),
        (
            "moonshine",
            "does not have num_mel_bins and max_source_positions in its config: it takes other sounds than Whisper",
        ),
        ("timm_wrapper", "needs a package that is not installed"),
        ("gemma4_text", "gives layers sizes of their own in its config, by per_layer_config"),
        ("llava_next", "does not run on input_ids and pixel_values as other models take them"),
    ],
)
def test_what_is_refused_is_told_by_a_rule(model_type: str, reason: str) -> None:
    with pytest.raises(UnfitError, match=f"^model_type='{model_type}' {reason}") as refusal:
        family_of(usual_config(model_type))
    assert refusal.value.rule == reason


def test_noise_that_is_no_dropout_is_refused() -> None:
    quiet, noisy = (AutoConfig.for_model("mixtral", router_jitter_noise=noise) for noise in (0.0, 0.1))
    assert structure_key(quiet) != structure_key(noisy)
    rule = "it draws random numbers that are no dropout, so that no two runs of it are alike"
    assert prove(noisy).whole == Finding("unfit", rule)


def test_masks_that_say_what_causality_says_are_needless() -> None:
    config = AutoConfig.for_model("layoutlm")
    family = family_of(config)
    assert (family.asks_for_attention, family.needless_masks, family.stacks[0].causal) == (True, True, False)
    assert prove(config) == Proof()


def test_masks_that_hide_more_are_the_types_own_attention() -> None:
    family = family_of(AutoConfig.for_model("doge"))
    assert (family.asks_for_attention, family.needless_masks) == (False, False)


def test_an_attention_that_views_by_a_width_of_its_own_counts_what_a_rank_has() -> None:
    assert prove(AutoConfig.for_model("xglm")) == Proof()


@pytest.mark.parametrize(("model_type", "layers"), [("umt5", "num_decoder_layers"), ("blenderbot", "encoder_layers")])
def test_a_stack_of_one_layer_is_a_stack(model_type: str, layers: str) -> None:
    config = AutoConfig.for_model(model_type, **{layers: 1})
    paths = [stack.path for stack in family_of(config).stacks]
    assert [path.rpartition(".")[0].removeprefix("model.") for path in paths] == ["encoder", "decoder"]


def test_twins_shrink_by_what_names_end_in() -> None:
    short = AutoConfig.for_model("whisper", max_target_positions=9)
    assert twin_config(short).max_target_positions == 64  # places for all of its own tokens
    mixed = twin_config(AutoConfig.for_model("bamba"))
    assert mixed.mamba_n_heads * mixed.mamba_d_head == mixed.mamba_expand * mixed.hidden_size
    assert twin_config(AutoConfig.for_model("electra")).embedding_size < 64  # narrower than hidden states, as its own
    assert twin_config(AutoConfig.for_model("roformer")).embedding_size == 64


def test_a_rank_takes_its_heads_of_biases_that_layers_are_given() -> None:
    config = AutoConfig.for_model("bloom")
    attention = family_of(config).stacks[0].regions[0]
    assert attention.head_inputs == {"alibi": 0}  # [samples x heads, 1, tokens]
    assert prove(config) == Proof()


def test_heads_of_a_part_whose_linears_stay_whole_are_not_divided() -> None:
    config = AutoConfig.for_model("deepseek_v32")  # an indexer has heads of its own
    assert not any("indexer" in name for region in family_of(config).stacks[0].regions for name in region.columns)
    assert prove(config) == Proof()


def test_stages_shrink_together() -> None:
    config = AutoConfig.for_model("swin", depths=[2, 2, 18], num_heads=[4, 8, 16])
    twin = twin_config(config)
    assert (twin.depths, twin.num_heads, twin.embed_dim, twin.hidden_size) == ([2, 2, 2], [6, 12, 24], 24, 96)
    assert twin.image_size // twin.patch_size // 4 > twin.window_size  # several windows, even in the last stage
    assert structure_key(config) != structure_key(AutoConfig.for_model("swin"))
    as_large = twin_config(config, keep_images=True)
    assert (as_large.image_size, as_large.window_size) == (config.image_size, config.window_size)


def test_stages_of_growing_width_are_stacks_whose_layers_see_windows() -> None:
    """Their scores have a table of biases with an entry a head in its second dim."""
    config = AutoConfig.for_model("swin")
    stacks = family_of(config).stacks
    assert [stack.path for stack in stacks] == [f"swin.encoder.layers.{i}.blocks" for i in range(4)]
    assert [stack.joined for stack in stacks] == [(), *((f"swin.encoder.layers.{i}.downsample",) for i in range(3))]
    attention = stacks[3].regions[0]
    assert attention.windows
    assert stacks[3].windowed
    assert attention.by_head_dims == {"attention.relative_position_bias.relative_position_bias_table": 1}
    spec = build_spec(config)
    assert [(kind.fixed_tokens, kind.attention_span, kind.head_dim) for kind in spec.layers] == [
        (3136, 49, 32), (784, 49, 32), (196, 49, 32), (49, 49, 32),
    ]  # fmt: skip
    assert prove(config) == Proof()


def test_scores_scaled_by_head_and_positions_of_windows_by_a_network() -> None:
    config = AutoConfig.for_model("swinv2")
    attention = family_of(config).stacks[0].regions[0]
    assert attention.by_head == {"attention.self.logit_scale": "heads"}
    assert attention.columns["attention.self.continuous_position_bias_mlp.2"] == ("heads",)
    assert [kind.hidden_size for kind in build_spec(config).layers] == [96, 192, 384, 768]
    assert prove(config) == Proof()


@pytest.mark.parametrize("depths", [[0, 2], [2, 2**31]])
def test_stages_of_no_layers_or_too_many_are_refused(depths: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"must be one layer or more each, and 16,384 together at most"):
        meta_model(AutoConfig.for_model("swin", depths=depths, num_heads=[3, 6]))


def test_images_that_a_model_cannot_run_are_refused() -> None:
    with pytest.raises(ConfigError, match="a swin of this config cannot run images of its size"):
        build_spec(AutoConfig.for_model("swin", image_size=32))
