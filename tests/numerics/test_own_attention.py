"""Types that attend by themselves, whose layers are told of masks and biases by the model's own forward."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from galvatron.models import freeze_parameters
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing.models import tiny_model
from galvatron.testing.parity import parity
from galvatron.testing.pool import Pool
from galvatron.testing.reference import Recipe

ALIKE = {"vocab_size": 97, "hidden_size": 32, "attention_dropout": 0.0, "hidden_dropout": 0.0, "bos_token_id": 0}
TYPES: dict[str, dict[str, Any]] = {
    "bloom": {**ALIKE, "n_layer": 3, "n_head": 4, "eos_token_id": 0},
    "falcon": {**ALIKE, "num_hidden_layers": 3, "num_attention_heads": 4, "eos_token_id": 0},
    "mpt": {  # biases of as many heads as the embedding may have rows
        "vocab_size": 97,
        "d_model": 32,
        "n_layers": 3,
        "n_heads": 4,
        "max_seq_len": 32,
        "resid_pdrop": 0.0,
        "emb_pdrop": 0.0,
    },
    "mvp": {  # of two stacks: a decoder's rows see states of their own
        "vocab_size": 97,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    },
}
TP, SHARDED, ALONE = LayerStrategy(tp=2), LayerStrategy(dp_shard=2, zero=3), LayerStrategy(dp_replicate=2)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("ends", [TP, ALONE], ids=str)
def test_layers_of_other_rows_than_the_embedding(pool: Pool, model_type: str, ends: LayerStrategy) -> None:
    plan = Plan(
        model=model_type, world_size=2, layers_per_stage=(3,), num_microbatches=2, global_batch_size=8, seq_len=16,
        embedding=ends, layers=(SHARDED, ALONE.model_copy(update={"recompute": "full"}), TP), head=ends,
    )  # fmt: skip
    model = tiny_model(AutoConfig.for_model(model_type, **TYPES[model_type]))
    if model_type == "mvp":
        freeze_parameters(model, ("*k_proj.bias",))  # whose true gradient is zero
    report = parity(model, plan, pool=pool, recipe=Recipe(num_steps=2))
    assert report.ok, report.explain()
