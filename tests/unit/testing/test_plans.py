from __future__ import annotations

import pytest

from galvatron.core.model import RECOMPUTES, Cut, LayerKind, ModelSpec, ParameterSpec, UnitSpec
from galvatron.plan.plan import SCHEDULES
from galvatron.testing.plans import pure_plans, random_plans


def _spec(num_layers: int = 5, heads: int = 4, tied: bool = False) -> ModelSpec:
    vocabulary = UnitSpec(
        parameters=(ParameterSpec(name="weight", shape=(97, 32), cut=Cut(dim=0, segments=(97,), uneven="ceil")),)
    )
    layer = (ParameterSpec(name="q.weight", shape=(32, 32), cut=Cut(dim=0, segments=(heads,))),)
    sizes = {"hidden_size": 32, "ffn_size": 48, "num_heads": heads, "num_kv_heads": heads, "head_dim": 8}
    return ModelSpec(
        name="toy",
        family="llama",
        layers=(LayerKind(count=num_layers, parameters=layer, **sizes),),
        vocab_size=97,
        max_seq_len=64,
        tied_embeddings=tied,
        embedding=vocabulary,
        head=vocabulary,
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4, 6, 8])
def test_random_plans_are_legal_different_and_repeatable(world_size: int, tied: bool) -> None:
    spec = _spec(tied=tied)
    plans = random_plans(spec, world_size, 40, seed=1)
    assert len(set(plans)) == 40
    for plan in plans:
        plan.validate(spec, world_size)
    assert plans[:7] == random_plans(spec, world_size, 7, seed=1)
    assert plans != random_plans(spec, world_size, 40, seed=2)


def test_random_plans_cover_what_they_promise() -> None:
    plans = random_plans(_spec(), 8, 60, seed=1)
    layers = [strategy for plan in plans for strategy in plan.layers]
    assert {plan.pp for plan in plans} == {1, 2, 4}
    assert {plan.schedule for plan in plans} == set(SCHEDULES)
    assert {plan.model_chunks for plan in random_plans(_spec(6), 4, 60, seed=1)} == {1, 2, 3}
    assert {plan.num_microbatches for plan in plans} == set(range(1, 9))
    assert any(plan.num_microbatches < plan.pp for plan in plans)
    assert any(len(set(plan.layers_per_stage)) > 1 for plan in plans)
    assert {strategy.zero for strategy in layers} == {0, 1, 2, 3}
    assert {strategy.tp for strategy in layers} == {1, 2, 4}
    assert {(s.ulysses, s.cp) for s in layers} >= {(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 1)}
    assert {strategy.recompute for strategy in layers} == set(RECOMPUTES)
    assert any(strategy.dp_shard > 1 and strategy.dp_replicate > 1 for strategy in layers)
    hosted = {(s.zero, s.tp > 1) for s in layers if s.offload == "optimizer"}
    assert hosted == {(zero, cut) for zero in range(4) for cut in (False, True)}
    assert any(plan.embedding != plan.head for plan in plans)
    assert all(len(set(plan.layers)) > 1 for plan in plans if plan.stage_size > 1)


def test_pure_plans_by_name() -> None:
    alone = {"dp", "selective", "mlp", "linears", "full"}
    assert set(pure_plans(_spec(), 1)) == alone
    names = alone | {"zero1", "zero2", "zero3", "tp", "ulysses", "ring", "offload", *SCHEDULES, "chunked_zero_bubble"}
    assert set(pure_plans(_spec(), 2)) == names
    eight = pure_plans(_spec(heads=8), 8)
    assert {"hsdp1", "hsdp2", "hsdp3"} < set(eight)
    assert eight["1f1b"].layers_per_stage == (2, 1, 1, 1)
    assert eight["interleaved"].layers_per_stage == (2, 1, 1, 1)  # two stages of two chunks
    assert "tp" not in pure_plans(_spec(heads=4), 8)
