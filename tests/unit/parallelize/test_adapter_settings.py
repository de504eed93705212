"""Which of peft's models parallelize takes, and the sentences for those that it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from galvatron.core.errors import ConfigError
from galvatron.models import adapter_of, family_of
from galvatron.models.lora import wrapped
from galvatron.parallelize.checks.model import check_model
from galvatron.parallelize.layers.fp8 import check_fp8
from galvatron.parallelize.layers.recompute import kept
from galvatron.testing.models import tiny_model

peft = pytest.importorskip("peft")
pytestmark = [  # peft's own, and its advice
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]


def wrap(family: str = "llama", **settings: Any) -> nn.Module:
    settings = {"target_modules": ["q_proj", "down_proj"], **settings}
    return peft.get_peft_model(tiny_model(family), peft.LoraConfig(**settings))


def added(family: str = "llama", **settings: Any) -> PreTrainedModel:
    model = tiny_model(family)
    model.add_adapter(peft.LoraConfig(**{"target_modules": ["q_proj", "down_proj"], **settings}))
    return model


def test_both_ways_to_add_an_adapter_are_taken() -> None:
    models = [
        wrapped(wrap(r=4, lora_alpha=6, rank_pattern={"down_proj": 2}, lora_dropout=0.1)),
        added(r=4, lora_alpha=6, rank_pattern={"down_proj": 2}, lora_dropout=0.1),
        added("gpt2", r=4, target_modules=["c_attn"], fan_in_fan_out=True, layers_to_transform=[1, 2]),
    ]
    found = [adapter_of(check_model(model)) for model in models]
    assert found[0] is not None
    assert found[1] is not None
    assert found[2] is not None
    assert found[0].scaling == found[1].scaling
    assert found[0].scaling["model.layers.0.mlp.down_proj"] == 3.0
    assert not found[0].transposed
    assert set(found[2].scaling) == found[2].transposed
    assert {path.split(".")[2] for path in found[2].transposed} == {"1", "2"}


def merged() -> nn.Module:
    model = wrap()
    model.merge_adapter()
    return model


def with_two() -> nn.Module:
    model = added()
    model.add_adapter(peft.LoraConfig(target_modules=["v_proj"]), "second")
    return model


OTHERS: dict[str, tuple[Callable[[], object], str]] = {
    "DoRA": (lambda: wrap(use_dora=True), "LoRA with use_dora=True cannot be trained; leave it at False"),
    "biases of B": (lambda: wrap(lora_bias=True), "LoRA with lora_bias=True cannot be trained"),
    "biases": (lambda: wrap(bias="all"), "LoRA with bias='all' cannot be trained; leave it at 'none'"),
    "heads": (lambda: wrap(modules_to_save=["lm_head"]), r"with modules_to_save=\['lm_head'\] cannot"),
    "experts": (
        lambda: wrap("mixtral", target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]),
        "LoRA with target_parameters=",
    ),
    "starts": (lambda: wrap(init_lora_weights="pissa"), "init_lora_weights='pissa' changes the base model too"),
    "embeddings": (
        lambda: wrap(target_modules=["embed_tokens"]),
        r"model\.embed_tokens \(Embedding\) has an adapter, but plain linears alone can",
    ),
    "head": (lambda: wrap(target_modules=["lm_head"]), "lm_head has an adapter, but linears of layers alone can"),
    "merged": (merged, r"the adapter of model\.layers\.0\.self_attn\.q_proj is merged or not active"),
    "two": (with_two, "one adapter can be trained, got default, second; delete the others"),
    "another method": (
        lambda: peft.get_peft_model(tiny_model("llama"), peft.IA3Config(task_type="CAUSAL_LM")),
        "of peft's methods LoRA can be trained, got IA3; use a LoraConfig",
    ),
    "prompts": (
        lambda: peft.get_peft_model(
            tiny_model("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        ),
        "of peft's methods LoRA can be trained, got PROMPT_TUNING",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_all_else_of_peft_is_refused(name: str) -> None:
    make, complaint = OTHERS[name]
    with pytest.raises(ConfigError, match=complaint):
        check_model(wrapped(make()))


def test_what_was_changed_since_is_refused() -> None:
    model = added()
    model.model.layers[1].self_attn.q_proj.lora_A["default"] = nn.Linear(32, 5, bias=False)
    with pytest.raises(ConfigError, match=r"q_proj\.lora_A\.default\.weight \[8, 32\] is a parameter"):
        check_model(model)


def test_fp8_is_refused_beside_adapters() -> None:
    model = added()
    with pytest.raises(ConfigError, match="fp8 products are not made beside LoRA adapters"):
        check_fp8(model, family_of(model.config), torch.device("cpu"), "bf16")


def test_recompute_keeps_what_is_narrow_and_what_is_dear() -> None:
    """Of three products of a linear with an adapter, all but B's."""
    plain, adapted = (True,), (True, False, True)
    regions = (((*adapted, *plain, *adapted), adapted), (adapted, adapted))
    selective = kept("selective", regions, summed=False)
    assert selective.products == {0, 2, 3, 4, 6, 7, 9, 10, 12}
    assert kept("mlp", regions, summed=True).products == {0, 2, 3, 4, 6}
    assert kept("linears", regions, summed=True) == kept("linears", (((True,), (True,)),) * 2, summed=True)
