"""Tiny models and plans of two to four ranks that planted errors show in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from galvatron.core.model import RECOMPUTES, Recompute
from galvatron.models import freeze_parameters
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing.models import tiny_model

TP, DP, ZERO3 = LayerStrategy(tp=2), LayerStrategy(dp_replicate=2), LayerStrategy(dp_shard=2, zero=3)
ZERO1, ZERO2 = LayerStrategy(dp_shard=2, zero=1), LayerStrategy(dp_shard=2, zero=2)
ALONE, CP, EP = LayerStrategy(), LayerStrategy(cp=2), LayerStrategy(ep=2, dp_replicate=2)
HYBRID = LayerStrategy(dp_shard=2, dp_replicate=2, zero=2)


def _plan(*units: LayerStrategy, stages: tuple[int, ...] = (), **changes: Any) -> Plan:
    """Of embedding, layers and head."""
    embedding, *layers, head = units
    fields = {"world_size": 2, "seq_len": 8, "num_microbatches": 2, "global_batch_size": 8, **changes}
    return Plan(
        model="x", layers_per_stage=stages or (len(layers),), embedding=embedding, layers=tuple(layers), head=head,
        **fields,
    )  # fmt: skip


def _again(recompute: Recompute) -> LayerStrategy:
    return TP.model_copy(update={"recompute": recompute})


@dataclass(frozen=True)
class Run:
    """A tiny model of ``family`` and a plan for it."""

    family: str
    overrides: dict[str, Any]
    plan: Plan
    freeze: tuple[str, ...] = ()

    def model(self) -> PreTrainedModel:
        """The tiny model, with what is frozen not requiring gradients."""
        model = tiny_model(self.family, **self.overrides)
        freeze_parameters(model, self.freeze)
        return model


FROZEN = ("*k_proj.bias",)  # whose true gradient is zero
BIASES, CALLS, DOCUMENTS = "router biases", "two calls", "packed ring"
ROUTERS_LOSS = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
RUNS = {
    "tp": Run("olmo2", {"num_hidden_layers": 2}, _plan(TP, TP, DP, TP)),
    "data parallel": Run(
        "llama",
        {"num_hidden_layers": 2},
        _plan(ZERO3, DP, ZERO3.model_copy(update={"offload": "optimizer"}), ZERO3),
    ),
    "ulysses, ring, tp, experts": Run(
        "gpt_oss",
        {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        _plan(DP, LayerStrategy(ulysses=2, ep=2), CP, TP, DP),
    ),
    "zero bubble": Run(
        "mixtral", {"num_hidden_layers": 2, **ROUTERS_LOSS},
        _plan(*(ALONE,) * 4, stages=(1, 1), schedule="zero_bubble"),
    ),
    "routers of two ranks": Run(
        "mixtral", {"num_hidden_layers": 1, **ROUTERS_LOSS}, _plan(DP, EP.model_copy(update={"recompute": "full"}), DP)
    ),
    "17 patches": Run("vit", {"num_hidden_layers": 1}, _plan(TP, TP, TP, seq_len=17), FROZEN),
    "two stacks": Run("t5", {"num_layers": 1, "num_decoder_layers": 2}, _plan(DP, DP, TP, TP, DP)),
    "stages of two stacks": Run("t5", {"num_layers": 1, "num_decoder_layers": 2}, _plan(*(ALONE,) * 5, stages=(2, 1))),
    BIASES: Run(
        "deepseek_v3", {"num_hidden_layers": 2, "num_local_experts": 16}, _plan(DP, DP, EP, DP),
    ),
    "pairs": Run("clip", {}, _plan(*(DP,) * 7, num_microbatches=1, global_batch_size=16), FROZEN),
    "fused heads": Run("phi3", {"num_hidden_layers": 1, "num_key_value_heads": 1}, _plan(TP, TP, TP)),
    "tied ends": Run("gpt2", {"n_layer": 2}, _plan(*(ALONE,) * 4, stages=(1, 1))),
    "a padding row": Run("llama", {"num_hidden_layers": 1, "vocab_size": 11, "pad_token_id": 7}, _plan(TP, TP, TP)),
    "capped scores": Run("gemma2", {"num_hidden_layers": 1, "final_logit_softcapping": 2.0}, _plan(DP, DP, DP)),
    "a head's bias": Run("bert", {"num_hidden_layers": 1}, _plan(DP, DP, DP), ("*key.bias",)),
    "windowed ring": Run("mistral", {"num_hidden_layers": 1}, _plan(DP, CP, DP)),
    DOCUMENTS: Run("llama", {"num_hidden_layers": 1}, _plan(DP, CP, DP)),
    CALLS: Run("llama", {"num_hidden_layers": 2}, _plan(TP, TP, ZERO2, TP, num_microbatches=1, global_batch_size=4)),
    "recompute": Run("llama", {"num_hidden_layers": 4}, _plan(TP, *map(_again, RECOMPUTES[1:]), TP)),
    "shared experts": Run("deepseek_v3", {"num_hidden_layers": 2}, _plan(DP, DP, EP, DP)),
    "shards in weight passes": Run(
        "llama", {"num_hidden_layers": 2}, _plan(ZERO3, ZERO1, ZERO2, ZERO3, schedule="zero_bubble")
    ),
    "replicas of shards": Run("llama", {"num_hidden_layers": 1}, _plan(*(HYBRID,) * 3, world_size=4)),
    "windows": Run("swin", {"depths": [1, 1], "num_heads": [2, 4]}, _plan(*(TP,) * 4, seq_len=100), FROZEN),
    "a tower": Run(
        "llava", {}, _plan(*(TP,) * 7, seq_len=16), ("*vision*k_proj.bias", "*encoder.layers.2.*", "*post_layernorm*")
    ),
    "a table on two stages": Run(
        "t5", {"num_layers": 1, "num_decoder_layers": 2, "tie_word_embeddings": False},
        _plan(*(ALONE,) * 5, stages=(2, 1)),
    ),
    "states through three stages": Run(
        "t5", {"num_layers": 1, "num_decoder_layers": 2}, _plan(*(ALONE,) * 5, stages=(1, 1, 1), world_size=3)
    ),
    "pairs in stages": Run(
        "clip", {}, _plan(*(ALONE,) * 7, stages=(3, 2), num_microbatches=1, global_batch_size=16), FROZEN
    ),
}  # fmt: skip
