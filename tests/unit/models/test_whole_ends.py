"""Models whose embedding and head look at whole sequences: what is found of them, and that it is right."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from galvatron.core.errors import ConfigError
from galvatron.core.tasks import Task
from galvatron.models import family_of, for_task, meta_model, spec_of, task_of
from galvatron.parallelize.proof import Proof, prove
from galvatron.plan import LayerStrategy, Plan, check_strategy
from galvatron.plan.filling import Filling, filling_of
from galvatron.testing.models import ENCODERS, tiny_config

TASKS: dict[str, Task] = {"bert": "masked_lm", "vit": "image_classification", "llama": "causal_lm"}


@pytest.mark.parametrize("family", ENCODERS)
def test_stages_and_cuts_of_encoders_are_right(family: str) -> None:
    config = tiny_config(family)
    assert family_of(config).ends == "whole"
    assert prove(config) == Proof()


def test_a_decoder_sees_what_the_encoder_ends_with() -> None:
    family = family_of(tiny_config("t5"))
    encoder, decoder = family.stacks
    assert (encoder.causal, encoder.side, decoder.causal, decoder.side) == (False, None, True, "encoder_hidden_states")
    sides = {region.gathering[0]: region.sides for region in decoder.regions if region.sides}
    assert sides == {"layer.1.EncDecAttention": ("key_value_states",)}
    assert (encoder.biased, encoder.outputs) == (True, 3)


def test_a_language_model_sees_images_by_states_between_layers_of_a_tower() -> None:
    spec, family = spec_of(meta_model(tiny_config("llava"))), family_of(tiny_config("llava"))
    assert [(stack.taken_at, stack.recorded) for stack in family.stacks] == [
        ("vision_feature_layer", False),
        (None, False),
    ]
    assert [(kind.fixed_tokens, kind.hidden_size, kind.idle) for kind in spec.layers] == [
        (10, 32, False),
        (10, 32, True),
        (0, 32, False),
    ]
    assert not any(parameter.trainable for parameter in spec.layers[1].parameters)
    for taken_at, idle in ((-1, 0), (-3, 2), (1, 2), (3, 0)):
        layers = spec_of(meta_model(tiny_config("llava", vision_feature_layer=taken_at))).layers
        assert sum(kind.count for kind in layers if kind.idle) == idle
    assert spec.layers[0].tokens(100) == 10


def test_patches_are_filled_up_where_they_are_cut() -> None:
    spec = spec_of(meta_model(tiny_config("vit")))
    (kind,) = spec.layers
    cut, rest = LayerStrategy(tp=2, ulysses=2), LayerStrategy(dp_replicate=4)
    plan = Plan(
        model="vit", world_size=4, layers_per_stage=(4,), num_microbatches=1, global_batch_size=4, seq_len=17,
        embedding=rest, layers=(rest, cut, rest, rest), head=rest,
    )  # fmt: skip
    plan.validate(spec, 4)
    filling = filling_of(plan, spec, kind)
    assert filling == Filling(17, 20)
    assert [filling.local(degree) for degree in (1, 2, 4)] == [17, 10, 5]
    text = spec_of(meta_model(tiny_config("llava", num_hidden_layers=1)))
    assert [text.patches(kind, 16) for kind in text.layers] == [10, 10, 0]


@pytest.mark.parametrize(
    ("strategy", "unit", "problem"),
    [
        (LayerStrategy(cp=2), "layer", "cp=2 cannot cut 17 patches, which 2 do not divide; set cp to 1"),
        (LayerStrategy(tp=32), "embedding", "tp=32 must not exceed the 17 patches of an image; lower it"),
    ],
)
def test_what_cannot_cut_patches(strategy: LayerStrategy, unit: str, problem: str) -> None:
    spec = spec_of(meta_model(tiny_config("vit")))
    assert check_strategy(strategy, unit, spec, strategy.num_devices, 32, 17) == problem


def test_a_weight_under_many_names_counts_once() -> None:
    spec = spec_of(meta_model(tiny_config("bart")))
    names = [parameter.name for parameter in (*spec.embedding.parameters, *spec.head.parameters)]
    assert names[0] == "model.shared.weight"
    assert len(names) == len(set(names))
    assert spec.num_parameters == sum(p.numel() for p in meta_model(tiny_config("bart")).parameters())


def test_what_only_the_model_itself_has_is_a_parameter_of_the_head() -> None:
    spec, family = spec_of(meta_model(tiny_config("clip"))), family_of(tiny_config("clip"))
    assert (family.task, family.bare) == ("contrast", ("logit_scale",))
    assert [(p.name, p.shape) for p in spec.head.parameters][-1] == ("logit_scale", ())
    assert spec.ends_alike
    assert not spec_of(meta_model(tiny_config("llama"))).ends_alike


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_any_type_with_a_head_for_it_classifies_texts(family: str) -> None:
    config = for_task(tiny_config(family), "text_classification")
    found = family_of(config)
    assert (found.ends, found.head, found.task) == ("whole", None, "text_classification")
    assert prove(config) == Proof()


@pytest.mark.parametrize(("family", "task"), TASKS.items())
def test_a_type_trains_for_what_it_is_known_for(family: str, task: Task) -> None:
    assert task_of(tiny_config(family)) == task


def test_a_config_that_names_its_architecture_trains_for_that() -> None:
    config = tiny_config("bert", architectures=["BertForSequenceClassification"])
    assert task_of(config) == "text_classification"


def test_a_task_that_a_type_has_no_head_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no model for task=masked_lm; choose one of causal_lm, text_class"):
        for_task(tiny_config("llama"), "masked_lm")


def test_images_are_sequences_of_one_length() -> None:
    spec = spec_of(meta_model(tiny_config("vit")))
    assert spec.max_seq_len == 17
    assert "must be 17" in str(spec.sequence_problem(8))
    assert spec.vocab_size == 5


def test_a_tied_bias_has_the_name_that_the_model_knows_it_by() -> None:
    names = [parameter.name for parameter in spec_of(meta_model(tiny_config("bert"))).head.parameters]
    assert names[-2:] == ["cls.predictions.bias", "cls.predictions.decoder.weight"]


def test_a_weight_that_is_known_by_its_heads_name_is_tied_to_none() -> None:
    sizes = {name: value for name, value in tiny_config("roberta").to_dict().items() if name != "model_type"}
    config = AutoConfig.for_model("camembert", **sizes)
    spec = spec_of(meta_model(config))
    assert spec.embedding.parameters[0].name == spec.head.parameters[-1].name == "lm_head.decoder.weight"
    assert spec.tied_names is None
    assert prove(config) == Proof()
