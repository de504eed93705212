"""Published runs of others, as far as their numbers are facts that fit in a test."""

from __future__ import annotations

import pytest

from galvatron.cost import predict
from galvatron.estimate import cluster, estimate_model, spec_of_config
from galvatron.plan import LayerStrategy, Plan

NEMOTRON_340B = {128: 4.61, 256: 4.67, 512: 4.70, 1024: 4.73, 2048: 4.84}
"""Seconds a step by devices: Nemotron-4 340B in bf16 on H100, tp 8, pp 8 with 12 chunks a stage, 16 microbatches of one
sequence of 4,096 a replica (NVIDIA, dgxc-benchmarking 24.11, nemotron README)."""
WIDE_LLAMA = {
    "model_type": "llama", "hidden_size": 18432, "intermediate_size": 49152, "num_hidden_layers": 96,
    "num_attention_heads": 96, "num_key_value_heads": 8, "vocab_size": 256000, "max_position_embeddings": 4096,
}  # fmt: skip
"""Its sizes with a gated MLP of as many parameters as its plain one."""


@pytest.mark.parametrize(("layer", "reduced_in"), [({"zero": 1}, "bf16"), ({"zero": 1}, "fp32"), ({}, "bf16")], ids=str)
def test_sums_over_more_replicas_hardly_hold_up_a_pipeline(layer, reduced_in):
    """16 times the devices and the batch took 5% longer: gathers and sums wait once a step, not stage after stage."""
    model = estimate_model(spec_of_config(WIDE_LLAMA, "340b"), "h100", seq_len=4096, tp_degrees=[8], max_batch=1)

    def step_s(devices: int) -> float:
        dp = devices // 64
        strategy = LayerStrategy(tp=8, **layer, **({"dp_shard": dp} if layer else {"dp_replicate": dp}))
        plan = Plan(
            model="340b",
            world_size=devices,
            layers_per_stage=(1,) * 96,
            schedule="interleaved",
            model_chunks=12,
            num_microbatches=16,
            global_batch_size=16 * dp,
            seq_len=4096,
            precision="bf16",
            grad_reduce_dtype=reduced_in,
            embedding=strategy,
            layers=(strategy,) * 96,
            head=strategy,
        )
        return predict(plan, model, cluster(f"h100:{devices // 8}x8")).step_time_s

    for devices, seconds in NEMOTRON_340B.items():
        grown = seconds / NEMOTRON_340B[128]
        assert step_s(devices) / step_s(128) == pytest.approx(grown, abs=0.03)
    assert step_s(2048) / step_s(128) == pytest.approx(1.05, abs=0.016)
