from __future__ import annotations

import pytest
import torch

from galvatron.core.tasks import TOKEN_TASKS
from galvatron.models import random_inputs, task_of
from galvatron.models.inputs import words_of
from galvatron.testing.models import FAMILIES, VARIANTS, Variant, tiny_config, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_hide_nothing_and_repeat(family: str) -> None:
    model = tiny_model(family, seed=3)
    again = dict(tiny_model(family, seed=3).named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.std() > 0.05, f"{name} is all alike"
        assert torch.equal(parameter, again[name])
    assert not torch.equal(model.get_input_embeddings().weight, tiny_model(family, 4).get_input_embeddings().weight)


def test_overrides_are_hugging_faces_words() -> None:
    config = tiny_config("llama", num_key_value_heads=1, tie_word_embeddings=True)
    assert (config.num_key_value_heads, config.tie_word_embeddings) == (1, True)


@pytest.mark.parametrize("name", [variant.name for variant in VARIANTS])
def test_every_variant_runs_with_four_and_eight_heads(name: str) -> None:
    for heads in (4, 8):
        config = Variant.named(name).config(heads)
        task, generator = task_of(config), torch.Generator().manual_seed(0)
        outputs = tiny_model(config)(**random_inputs(config, task, 1, 16, generator))
        if task == "contrast":
            assert outputs.logits_per_text.shape == (1, 1)
            continue
        logits = outputs.logits
        assert logits.shape == ((1, 16, words_of(config)) if task in TOKEN_TASKS else (1, config.num_labels))


def test_mistrals_window_is_felt_within_a_test_sequence() -> None:
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        short = tiny_model("mistral")(tokens, use_cache=False).logits
        long = tiny_model("mistral", sliding_window=16)(tokens, use_cache=False).logits
    assert torch.allclose(short[:, :5], long[:, :5], atol=1e-5)
    assert not torch.allclose(short[:, 6:], long[:, 6:], atol=1e-2)
