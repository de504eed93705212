"""LoRA adapters under every strategy, against one process that runs peft's own modules."""

from __future__ import annotations

import pytest

from galvatron.plan import LayerStrategy, Plan
from galvatron.testing.models import ADAPTED
from galvatron.testing.plans import pure_plans, random_plans
from galvatron.testing.sweep import Sweep, variant_spec

pytest.importorskip("peft")

NAMES = [variant.name for variant in ADAPTED]
DECODERS = [name for name in NAMES if name not in ("bert-lora", "t5-lora")]
CUT, DEEP = LayerStrategy(tp=2, recompute="selective"), LayerStrategy(dp_shard=2, zero=3, recompute="selective")


def mixed(variant: str) -> Plan:
    """Both cuts of every adapter beside shards, replicas and both cuts of the sequence, with recompute."""
    layers = (
        CUT,
        DEEP,
        LayerStrategy(ulysses=2, zero=2, recompute="mlp"),
        LayerStrategy(tp=2, recompute="linears"),
        LayerStrategy(cp=2, recompute="full"),
    )
    spec = variant_spec(variant, 2)
    count = spec.num_layers
    return Plan(
        model=variant, world_size=2, layers_per_stage=(count,), num_microbatches=2, global_batch_size=4, seq_len=16,
        embedding=LayerStrategy(tp=2), layers=layers[:count], head=LayerStrategy(tp=2),
    )  # fmt: skip


@pytest.mark.parametrize("variant", DECODERS)
def test_a_mix(sweep: Sweep, variant: str) -> None:
    report = sweep.parity(variant, mixed(variant))
    assert report.ok, report.explain()


@pytest.mark.parametrize("variant", ["gpt2-lora", "llama-lora-one-kv-head"])
def test_weight_passes_of_adapters(sweep: Sweep, variant: str) -> None:
    report = sweep.parity(variant, pure_plans(variant_spec(variant, 2), 2)["zero_bubble"])
    assert report.ok, report.explain()


@pytest.mark.slow
def test_layers_with_adapters_are_compiled_whole(sweep: Sweep) -> None:
    report = sweep.parity("phi3-lora", mixed("phi3-lora"), engine="aot_eager")
    assert report.ok, report.explain()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("variant", NAMES)
def test_all_strategies_and_mixes(sweep: Sweep, variant: str, world_size: int) -> None:
    spec = variant_spec(variant, world_size)
    plans = [*pure_plans(spec, world_size).values(), *random_plans(spec, world_size, 6, seed=0)]
    for plan in plans:
        report = sweep.parity(variant, plan)
        assert report.ok, report.explain()
