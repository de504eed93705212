"""Random mixes of strategies against one process; the seed makes them the same plans every time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from galvatron.core.model import Precision
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing.models import SAMPLED, VARIANTS
from galvatron.testing.plans import random_plans
from galvatron.testing.sweep import Sweep, variant_spec

SEED = 2026
NAMES = [variant.name for variant in VARIANTS]
WHOLE = [name for name in NAMES if name not in SAMPLED]
SAMPLES = {2: 1, 4: 1}
"""Plans per variant in the default run, beside one on eight ranks for some."""


def _check(sweep: Sweep, variant: str, world_size: int, first: int, last: int) -> None:
    plans = random_plans(variant_spec(variant, world_size), world_size, last, SEED)[first:]
    failures = []
    for index, plan in enumerate(plans, start=first):
        recipe = replace(sweep.recipe, max_grad_norm=0.1) if index % 4 == 3 else sweep.recipe
        report = sweep.parity(variant, plan, recipe)
        if not report.ok:
            failures.append(f"plan {index}: {report.explain()}")
    assert not failures, "\n".join(failures)


def test_a_stage_that_ends_in_another_layout_than_it_began(sweep: Sweep) -> None:
    """GPT-2's decoder returns its output in the shape of its input: once sent on as [4, 8] instead of [2, 16]."""
    sharded = LayerStrategy(dp_shard=2, zero=1)
    plan = Plan(
        model="gpt2",
        world_size=4,
        layers_per_stage=(3, 2),
        num_microbatches=2,
        global_batch_size=8,
        seq_len=16,
        embedding=LayerStrategy(tp=2),
        layers=(sharded,) * 5,
        head=LayerStrategy(tp=2),
    )
    report = sweep.parity("gpt2", plan)
    assert report.ok, report.explain()


def test_replicas_that_reduce_every_microbatch_after_many_forwards(sweep: Sweep) -> None:
    """The head's gradient waits for its last backward; FSDP2 once added microbatches with and without it."""
    hybrid = LayerStrategy(dp_shard=2, dp_replicate=2, zero=2)
    plan = Plan(
        model="llama",
        world_size=4,
        layers_per_stage=(5,),
        schedule="gpipe",
        num_microbatches=3,
        global_batch_size=12,
        seq_len=16,
        embedding=hybrid,
        layers=(hybrid,) * 5,
        head=hybrid,
    )
    report = sweep.parity("llama", plan)
    assert report.ok, report.explain()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_halves_that_add_up_in_fp32_after_many_forwards(sweep: Sweep, precision: Precision) -> None:
    """Under ZeRO 1 FSDP2 once reduced the norm's sum, in fp32, beside the head's first gradient, in a half."""
    sharded = LayerStrategy(dp_shard=2, zero=1)
    plan = Plan(
        model="llama",
        world_size=2,
        layers_per_stage=(5,),
        schedule="gpipe",
        num_microbatches=3,
        global_batch_size=6,
        seq_len=16,
        precision=precision,
        embedding=sharded,
        layers=(sharded,) * 5,
        head=sharded,
    )
    report = sweep.parity("llama", plan)
    assert report.ok, report.explain()


def test_replicas_whose_weight_passes_come_after_two_backwards(sweep: Sweep) -> None:
    """The first weight pass reduced norms of both microbatches, the second none, which FSDP2 could not add up."""
    hybrid = LayerStrategy(dp_shard=2, dp_replicate=2, zero=3)
    plan = Plan(
        model="llama",
        world_size=8,
        layers_per_stage=(2, 3),
        schedule="zero_bubble",
        num_microbatches=2,
        global_batch_size=8,
        seq_len=16,
        precision="fp16",
        embedding=hybrid,
        layers=(hybrid,) * 5,
        head=hybrid,
    )
    report = sweep.parity("llama", plan)
    assert report.ok, report.explain()


@pytest.mark.parametrize(("sizes", "m"), [((2, 1, 1, 1), 4), ((1, 1, 1, 2), 2)])
def test_weight_passes_of_two_chunks(sweep: Sweep, sizes: tuple[int, ...], m: int) -> None:
    """Every ZeRO stage, replicas, recompute and tensor parallelism, in chunks of unequal sizes."""
    tensor, plain = LayerStrategy(tp=2), LayerStrategy(dp_replicate=2)
    one, two, three = (LayerStrategy.model_validate({"dp_shard": 2, "zero": zero}) for zero in (1, 2, 3))
    again = three.model_copy(update={"recompute": "full"})
    plan = Plan(
        model="llama",
        world_size=4,
        layers_per_stage=sizes,
        schedule="zero_bubble",
        model_chunks=2,
        num_microbatches=m,
        global_batch_size=4 * m,
        seq_len=16,
        embedding=two,
        layers=(one, tensor.model_copy(update={"recompute": "selective"}), again, plain, three)[:: 1 if m > 2 else -1],
        head=two,
    )
    report = sweep.parity("llama", plan)
    assert report.ok, report.explain()


def test_a_compiled_layer_that_no_gradient_passes(sweep: Sweep) -> None:
    """The compiler once failed on its recompute, which has nothing to serve."""
    one = LayerStrategy()
    layers = (LayerStrategy(recompute="full"), one, one, one)
    fields = {"world_size": 1, "layers_per_stage": (4,), "global_batch_size": 2, "seq_len": 16}
    plan = Plan(model="llama", embedding=one, layers=layers, head=one, **fields)
    report = sweep.parity("llama-lower-half-frozen", plan, engine="aot_eager")
    assert report.ok, report.explain()


@pytest.mark.parametrize("world_size", SAMPLES)
@pytest.mark.parametrize("variant", WHOLE)
def test_a_few_mixed_plans(sweep: Sweep, variant: str, world_size: int) -> None:
    _check(sweep, variant, world_size, 0, SAMPLES[world_size])


@pytest.mark.parametrize("variant", ["gpt2", "llama-tied-one-kv-head", "qwen3"])
def test_a_mixed_plan_of_eight_ranks(sweep: Sweep, variant: str) -> None:
    _check(sweep, variant, 8, 0, 1)


@pytest.mark.parametrize("variant", ["gemma2", "phi3", "gpt_neox", "opt"])
def test_a_mixed_plan_of_other_families(sweep: Sweep, variant: str) -> None:
    _check(sweep, variant, 4, 0, 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("variant", NAMES)
def test_forty_mixed_plans(sweep: Sweep, variant: str, world_size: int) -> None:
    _check(sweep, variant, world_size, SAMPLES.get(world_size, 0), 40)
