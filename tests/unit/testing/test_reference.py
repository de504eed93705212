from __future__ import annotations

import dataclasses

import pytest
import torch

from galvatron.core.errors import ConfigError
from galvatron.testing.models import tiny_config, tiny_model
from galvatron.testing.reference import (
    IGNORED,
    Recipe,
    Reference,
    make_batches,
    mean_loss,
    pair_loss,
    train_reference,
)


def test_the_loss_is_hugging_faces_own() -> None:
    model = tiny_model("llama")
    step = train_reference(model, 4, 16).steps[0]
    assert mean_loss(model, step.inputs, step.labels).item() == pytest.approx(step.loss, rel=1e-6)
    # Hugging Face shifts labels itself: it gets them one place to the right, which loses the last of each sequence
    unshifted = torch.cat([torch.full((4, 1), IGNORED), step.labels[:, :-1]], dim=1)
    without_last = torch.cat([step.labels[:, :-1], torch.full((4, 1), IGNORED)], dim=1)
    own = model(**step.inputs, labels=unshifted, use_cache=False).loss
    assert own.item() == pytest.approx(mean_loss(model, step.inputs, without_last).item(), rel=1e-6)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_loss_of_pairs_is_hugging_faces_own(family: str) -> None:
    model = tiny_model(family)
    inputs, labels = make_batches(Recipe(), model.config, 4, 16)[0]
    logits = model(**inputs).logits_per_text
    assert pair_loss(logits, family == "siglip").item() == pytest.approx(mean_loss(model, inputs, labels).item())


def test_the_model_is_left_alone_and_the_run_repeats() -> None:
    model = tiny_model("gpt2")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, second = train_reference(model, 2, 16), train_reference(model, 2, 16)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert first.final_loss == second.final_loss < first.steps[0].loss
    assert all(torch.equal(p, second.parameters[name]) for name, p in first.parameters.items())


def test_batches_count_unequal_numbers_of_tokens_down_to_none() -> None:
    for inputs, labels in make_batches(Recipe(), tiny_config("gpt2"), 6, 16):
        counts = (labels != IGNORED).sum(dim=1).tolist()
        assert inputs["input_ids"].shape == labels.shape == (6, 16)
        assert counts[-1] == 0
        assert len(set(counts)) > 2
    assert all((labels != IGNORED).any() for _, labels in make_batches(Recipe(), tiny_config("gpt2"), 1, 16))


def test_clipping_bounds_the_update_not_the_recorded_gradients() -> None:
    model = tiny_model("qwen3")
    free, clipped = train_reference(model, 2, 16), train_reference(model, 2, 16, Recipe(max_grad_norm=0.1))
    assert clipped.steps[0].grad_norm == free.steps[0].grad_norm > 0.1
    name = "model.norm.weight"
    assert torch.equal(clipped.steps[0].gradients[name], free.steps[0].gradients[name])
    assert clipped.exp_avg[name].abs().max() < free.exp_avg[name].abs().max()


def test_a_saved_reference_is_the_same(tmp_path) -> None:
    reference = train_reference(tiny_model("qwen2"), 2, 16)
    reference.save(tmp_path / "reference.pt")
    loaded = Reference.load(tmp_path / "reference.pt")
    assert loaded.recipe == reference.recipe
    assert loaded.steps[1].loss == reference.steps[1].loss
    for field in dataclasses.fields(Reference):
        value = getattr(reference, field.name)
        if isinstance(value, dict):
            assert all(torch.equal(tensor, getattr(loaded, field.name)[name]) for name, tensor in value.items())
    assert torch.equal(
        dict(loaded.model().named_parameters())["model.norm.weight"], reference.initial["model.norm.weight"]
    )


def test_dropout_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn drops 0\.1"):
        train_reference(tiny_model(tiny_config("llama", attention_dropout=0.1)), 2, 16)
