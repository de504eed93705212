"""What parallelize refuses, each with one sentence, before anything of the model is consumed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import AutoModel, PreTrainedModel

from galvatron.core.errors import ConfigError, PlanError
from galvatron.models import build_spec, family_of, meta_model
from galvatron.parallelize import parallelize
from galvatron.parallelize.checks.model import check_model
from galvatron.parallelize.layers.attention import NAME, use_attention
from galvatron.parallelize.layers.tensor_parallel import cut_embedding
from galvatron.parallelize.processes.collectives import AxisGroup
from galvatron.testing.models import FAMILIES, tiny_config, tiny_model


class ScaledEmbedding(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class DistributedDataParallel(nn.Module):
    """Shaped as torch's, which needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_makes_is_taken(family: str) -> None:
    model = tiny_model(family)
    model(torch.zeros(1, 4, dtype=torch.long), output_hidden_states=True)  # leaves hooks that record nothing
    check_model(model)
    check_model(tiny_model(family, pad_token_id=3).to(torch.bfloat16).eval())
    check_model(meta_model(model.config))


OTHERS: dict[str, tuple[Callable[[], object], str]] = {
    "base model": (
        lambda: AutoModel.from_config(tiny_config("llama")),
        "model_type='llama' trains as LlamaForCausalLM, got LlamaModel; load the model with AutoModelForCausalLM",
    ),
    "module": (lambda: nn.Linear(2, 2), "takes a Hugging Face causal language model, got Linear; load one"),
    "wrapper": (
        lambda: DistributedDataParallel(tiny_model("llama")),
        r"got DistributedDataParallel; give its \.module",
    ),
    "config": (lambda: tiny_config("llama"), "got LlamaConfig; load one with AutoModelForCausalLM"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_classes_are_refused(name: str) -> None:
    make, message = OTHERS[name]
    with pytest.raises(ConfigError, match=message):
        parallelize(make(), None)  # type: ignore[arg-type]


def test_what_is_no_plan_is_refused() -> None:
    with pytest.raises(PlanError, match=r"takes a Plan, got str; load a file with Plan\.load"):
        parallelize(tiny_model("llama"), "plan.json")  # type: ignore[arg-type]


def _scale(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.scale = nn.Parameter(torch.ones(3))


def _buffer(model: PreTrainedModel) -> None:
    model.model.norm.register_buffer("shift", torch.zeros(2))


def _attribute(name: str, value: object) -> Callable[[PreTrainedModel], None]:
    return lambda model: setattr(model.model.embed_tokens, name, value)


def _scaled(model: PreTrainedModel) -> None:
    model.model.embed_tokens = ScaledEmbedding(97, 32)


def _replaced(model: PreTrainedModel) -> None:
    module = model.model.layers[0].mlp
    module.forward = module.forward


def _head_bias(model: PreTrainedModel) -> None:
    model.lm_head = nn.Linear(32, 97)


def _eight_bits(model: PreTrainedModel) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.detach().to(torch.float8_e4m3fn))


def _compiled(model: PreTrainedModel) -> None:
    model.model.layers[0]._compiled_call_impl = model.model.layers[0].__call__  # what .compile() leaves, without it


def _checkpointing(model: PreTrainedModel) -> None:
    model.model.layers[2].gradient_checkpointing = True


def _shared(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def _without_buffer(model: PreTrainedModel) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.to("meta")


CHANGES: dict[str, tuple[Callable[[PreTrainedModel], object], str]] = {
    "a further parameter": (
        _scale,
        r"layers\.1\.mlp\.scale \[3\] is not a parameter of LlamaForCausalLM of this",
    ),
    "a further buffer": (_buffer, r"model\.norm\.shift \[2\] is not a buffer of LlamaForCausalLM"),
    "a bias of the head": (_head_bias, r"lm_head\.bias \[97\] is not a parameter"),
    "fewer layers": (lambda m: m.model.layers.__delitem__(3), r"model\.layers\.3\.\S+ \[32, 32\] is a parameter of"),
    "a shared weight": (_shared, r"layers\.1\.mlp\.up_proj\.weight \[48, 32\] is a parameter .* here it is missing"),
    "a config of another vocabulary": (lambda m: setattr(m.config, "vocab_size", 98), r"here it is \[97, 32\]"),
    "a scaled embedding": (_scaled, r"model\.embed_tokens \S+Embedding\) is a module .* is \S+ScaledEmbedding"),
    "max_norm": (_attribute("max_norm", 1.0), r"embed_tokens \(Embedding\) has max_norm=1\.0, which works on whole"),
    "scale_grad_by_freq": (_attribute("scale_grad_by_freq", True), "has scale_grad_by_freq=True"),
    "sparse": (_attribute("sparse", True), "has sparse=True"),
    "a parametrization": (lambda m: weight_norm(m.model.layers[0].mlp.up_proj), r"up_proj\.parametrizations\S+ \[48"),
    "a forward hook": (lambda m: m.model.norm.register_forward_hook(lambda *_: None), r"model\.norm .* has hooks"),
    "a gradient hook": (lambda m: m.model.norm.register_full_backward_hook(lambda *_: None), "has hooks"),
    "a parameter's hook": (lambda m: m.model.norm.weight.register_hook(lambda g: g), r"model\.norm\.weight has hooks"),
    "gradients for embeddings": (lambda m: m.enable_input_require_grads(), "embed_tokens .* has hooks"),
    "a replaced forward": (_replaced, r"model\.layers\.0\.mlp \(LlamaMLP\) has a replaced forward"),
    "compilation": (_compiled, r"model\.layers\.0 \(LlamaDecoderLayer\) is compiled"),
    "gradient checkpointing": (
        _checkpointing,
        r"is the plan's to decide \(recompute\)",
    ),
    "eight bits": (_eight_bits, r"up_proj\.weight is torch\.float8_e4m3fn, whose numbers need scales"),
    "a buffer on meta": (_without_buffer, r"buffer model\.rotary_emb\.inv_freq is on meta"),
    "quantisation": (
        lambda m: setattr(m.config, "quantization_config", {"quant_method": "fp8"}),
        "quantization_config of this llama config must be None, got fp8",
    ),
    "attention both ways": (lambda m: setattr(m.config, "is_causal", False), "is_causal .* must be True, got False"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_refused_and_left_as_it_was(name: str) -> None:
    change, message = CHANGES[name]
    model = tiny_model("llama")
    change(model)
    before = list(model.named_parameters())
    with pytest.raises(ConfigError, match=message):
        parallelize(model, None)  # type: ignore[arg-type]
    assert all(now is then for (_, now), (_, then) in zip(model.named_parameters(), before, strict=True))


def test_cross_attention_is_refused() -> None:
    with pytest.raises(ConfigError, match="add_cross_attention of this gpt2 config must be False, got True"):
        check_model(tiny_model("gpt2", add_cross_attention=True))


def test_a_cut_embedding_keeps_what_its_class_does_to_rows() -> None:
    parameter = build_spec(tiny_config("llama")).embedding.parameters[0]
    table = ScaledEmbedding(97, 32)
    cut_embedding(table, parameter, AxisGroup(None, (2,), 0))
    ids = torch.tensor([[3, 60], [96, 5]])  # 60 and 96 are the other rank's
    rows = table(ids)
    assert torch.equal(rows[0, 0], 2 * table.weight[3])
    assert rows[1].abs().sum() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_the_users_config_changes(family: str) -> None:
    config = tiny_config(family)
    config.dtype = torch.bfloat16
    before, attention = config.to_dict(), config._attn_implementation
    build_spec(config)
    model = meta_model(config)
    tiny_model(config)
    assert (config.to_dict(), config._attn_implementation) == (before, attention)
    config = model.config
    before, attention = config.to_dict(), config._attn_implementation
    use_attention(model, family_of(model.config))
    assert (model.config.to_dict(), model.config._attn_implementation) == (before, attention)
    assert model.config is config
    layer = next(module for name, module in model.named_modules() if name.endswith(("attn", "attention")))
    assert layer.config._attn_implementation == NAME


def test_our_attention_is_right_or_refuses() -> None:
    ids = torch.arange(12).unsqueeze(0)
    plain, ours = tiny_model("mistral"), tiny_model("mistral")
    use_attention(ours, family_of(ours.config))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
        cache = ours(ids[:, :8], use_cache=True).past_key_values
        with pytest.raises(ConfigError, match="got 4 queries for 8 keys"):
            ours(ids[:, 8:], past_key_values=cache)
        with pytest.raises(ConfigError, match=r"a parallel model sees whole sequences"):
            ours.generate(ids, max_new_tokens=2)
