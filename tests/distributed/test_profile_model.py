from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from galvatron.core.errors import ConfigError
from galvatron.core.model_profile import ModelProfile
from galvatron.models import meta_model
from galvatron.parallelize import init_world, parallelize
from galvatron.plan import LayerStrategy, Plan
from galvatron.profile import profile_model
from galvatron.profile.storages import StorageLog
from galvatron.testing.memory import settled_bytes

S, BATCH = 64, 8
LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=131,
    max_position_embeddings=S,
)
GPT2 = GPT2Config(n_embd=64, n_layer=4, n_head=4, vocab_size=131, n_positions=S, bos_token_id=0, eos_token_id=0)
GPT2.attn_pdrop = GPT2.embd_pdrop = GPT2.resid_pdrop = 0.0

TP2 = LayerStrategy(tp=2)
DP2 = LayerStrategy(dp_shard=2, zero=2)
MIXED = (
    LayerStrategy(tp=2, recompute="selective"),
    LayerStrategy(tp=2, recompute="full"),
    LayerStrategy(dp_shard=2, zero=2, recompute="selective"),
    LayerStrategy(dp_replicate=2, recompute="full"),
)


def _profile(config: PretrainedConfig, precision: str) -> tuple[str, list[str]]:
    told: list[str] = []
    world = init_world("cpu")
    profile = profile_model(
        config, world, seq_len=S, precision=precision, max_batch=3, budget_s=0.5, progress=told.append
    )
    return profile.to_json(), told


def _saved_by_a_real_forward(config: PretrainedConfig, plan: Plan) -> int:
    """Bytes that one microbatch's forward leaves on this rank, gathered parameters left out."""
    world = init_world("cpu")
    model = parallelize(meta_model(config), plan, world=world)
    rows = {strategy: BATCH // strategy.dp for strategy in (plan.embedding, plan.head)}
    ids = torch.zeros(rows[plan.embedding], S, dtype=torch.int64)
    labels = torch.zeros(rows[plan.head], S, dtype=torch.int64)
    positions = torch.arange(S).unsqueeze(0)
    with StorageLog() as log:
        log.ignore([*model.stages[0].parameters(), *model.stages[0].buffers(), ids, positions])
        loss = model.stages[0](ids.clone(), positions.clone(), labels.clone(), 1.0)
        # now the gathered ones, and the gradient that the fused loss makes in the forward pass, or its flat buffer
        log.ignore(
            [loss, *model.stages[0].parameters(), *model.gathered_buffers(), *model.stages[0].early_gradient.tensors()]
        )
        saved_bytes = settled_bytes(log)
    loss.backward()
    return saved_bytes


def _counted(profile: ModelProfile, plan: Plan) -> int:
    samples = {(s.unit, s.tp, s.recompute): s for s in profile.activations}
    units = [("embedding", plan.embedding), *(("layer", layer) for layer in plan.layers), ("head", plan.head)]
    total = 0
    for unit, strategy in units:
        sample = samples[unit, strategy.tp, strategy.recompute]
        total += sample.fixed_bytes + BATCH // strategy.dp * sample.bytes_per_sequence
    return total


@pytest.mark.parametrize(
    ("config", "precision"), [(LLAMA, "fp32"), (LLAMA, "bf16"), (GPT2, "fp32")], ids=["llama", "llama-bf16", "gpt2"]
)
def test_profile_is_whole_equal_on_all_ranks_and_counts_what_the_runtime_saves(pool, config, precision):
    answers = pool.run(_profile, config, precision, world_size=2)
    assert len({text for text, _ in answers}) == 1, "ranks disagree"
    profile = ModelProfile.from_json(answers[0][0])
    assert profile.tp_degrees() == (1, 2)
    assert len(answers[0][1]) == 2 * len(profile.spec.units) + 1
    assert answers[0][1][-1] == "attention runs on flash"
    assert profile.attention_backend == "flash"
    assert (profile.context_bytes, profile.allocator_slack_fraction) == (None, None)  # of CUDA devices alone
    for unit in profile.spec.units:
        for tp in (1, 2):
            measured = [s for s in profile.compute if (s.unit, s.tp) == (unit, tp)]
            assert [s.batch for s in measured][:2] == [1, 2]
            assert all(s.forward_s > 0 and s.backward_s > 0 for s in measured)
            assert all(bool(s.again_s) == (unit == "layer") for s in measured)
    assert 0 < profile.optimizer_s_per_parameter < 1e-3
    for embedding, layers, head in (
        (TP2, (TP2,) * 4, TP2),
        (DP2, (DP2,) * 4, DP2),
        (TP2, MIXED, DP2),
        (DP2, MIXED[::-1], TP2),
    ):
        if config is GPT2 and embedding != head:
            continue  # GPT-2 ties them
        plan = Plan(
            model="tiny",
            world_size=2,
            layers_per_stage=(4,),
            global_batch_size=BATCH,
            seq_len=S,
            precision=precision,
            embedding=embedding,
            layers=layers,
            head=head,
        )
        saved = pool.run(_saved_by_a_real_forward, config, plan, world_size=2)
        assert max(saved) == pytest.approx(_counted(profile, plan), rel=0.005)


def _frozen_profile(freeze: list[str]) -> str:
    world = init_world("cpu")
    return profile_model(LLAMA, world, seq_len=S, max_batch=2, budget_s=0.1, freeze=freeze, tp_degrees=[1]).to_json()


def test_frozen_kinds_are_measured_with_what_they_skip_and_once_where_they_run_alike(pool):
    freeze = ["model.embed_tokens.*", "model.layers.0.*", "model.layers.2.*"]
    (text,) = pool.run(_frozen_profile, freeze, world_size=1)
    profile = ModelProfile.from_json(text)
    first, second, third, fourth = (kind.name for kind in profile.spec.layers)
    samples = {(s.unit, s.batch): s for s in profile.compute}
    assert {unit for unit, _ in samples} == set(profile.spec.units)
    for unit in ("embedding", first):  # nothing trained before
        assert samples[unit, 2].backward_s < 0.1 * samples[unit, 2].forward_s
    assert samples[third, 2].backward_s > 0.5 * samples[third, 2].forward_s  # gradients pass through
    assert samples[fourth, 2] == samples[second, 2].model_copy(update={"unit": fourth})
    saved = {s.unit: s.bytes_per_sequence for s in profile.activations if s.recompute == "none"}
    assert saved[first] == 0 < saved[third] < saved[second] == saved[fourth]


def _too_long(config: PretrainedConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        profile_model(config, init_world("cpu"), seq_len=2 * S)
    return f"{dist.get_rank()}: {caught.value}"


def test_a_sequence_longer_than_the_positions_is_refused(pool):
    assert "0: seq_len=128 must be from 1 to" in pool.run(_too_long, LLAMA, world_size=1)[0]
