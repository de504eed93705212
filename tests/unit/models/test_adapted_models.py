"""What peft puts into a model: described as the planner does, started as peft does."""

from __future__ import annotations

import math

import pytest
import torch

from galvatron.core.lora import Lora, with_adapters
from galvatron.models import InitialWeights, build_spec, family_of, model_to_train
from galvatron.testing.models import tiny_config

pytest.importorskip("peft")


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral", "olmo2", "gpt_neox"])
def test_the_planner_knows_what_peft_makes(family: str) -> None:
    config, lora = tiny_config(family), Lora(r=3)
    assert build_spec(config, "x", lora=lora) == with_adapters(build_spec(config, "x"), family_of(config), lora)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_new_adapters_change_nothing_yet(family: str) -> None:
    model = model_to_train(tiny_config(family), lora=Lora(r=3))
    weights, names = InitialWeights(model, seed=3), [n for n, p in model.named_parameters() if p.requires_grad]
    assert names
    for name in names:
        value = weights.read(name, (0, 0), tuple(weights.shape(name)))
        if ".lora_B." in name:
            assert not value.any()
        else:  # uniform within 1 / sqrt(inputs), as nn.Linear
            bound = 1 / math.sqrt(value.shape[1])
            assert 0.8 * bound < float(value.abs().max()) <= bound
    first, second = (weights.read(n, (0, 0), tuple(weights.shape(n))) for n in names[:3:2])
    assert not torch.equal(first[:, :8], second[:, :8])
