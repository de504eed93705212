"""Every pure strategy, for every family, against one process."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from galvatron.core.model import Precision
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing.models import SAMPLED, VARIANTS
from galvatron.testing.plans import SEQ_LEN, pure_plans
from galvatron.testing.reference import Recipe
from galvatron.testing.sweep import Sweep, variant_spec

STRATEGIES = (
    "dp",
    "zero1",
    "zero2",
    "zero3",
    "hsdp1",
    "hsdp2",
    "hsdp3",
    "tp",
    "ulysses",
    "ring",
    "selective",
    "mlp",
    "linears",
    "full",
    "gpipe",
    "1f1b",
    "interleaved",
    "zero_bubble",
    "chunked_zero_bubble",
)
OFTEN_MIXED = ("ulysses", "ring")
"""What random plans have in most of their layers: alone for two variants."""
PER_WORLD = {
    2: [s for s in STRATEGIES if "hsdp" not in s and s not in OFTEN_MIXED],
    4: [s for s in STRATEGIES if s not in ("selective", "mlp")],
}
NAMES = [variant.name for variant in VARIANTS]
WHOLE = [name for name in NAMES if name not in SAMPLED]
IN_TURN = 4
"""Strategies of two ranks that a variant goes through beside tensor parallelism: each is of three variants or four."""
NEEDS_FOUR = {"hsdp1", "hsdp2", "hsdp3"}
ONE_STACK = {"interleaved", "zero_bubble", "chunked_zero_bubble"}
SOME = ["1f1b", "zero3", "selective"]


def _check(
    sweep: Sweep,
    variant: str,
    world_size: int,
    strategy: str,
    recipe: Recipe | None = None,
    precision: Precision = "fp32",
) -> None:
    plan = pure_plans(variant_spec(variant, world_size), world_size)[strategy]
    report = sweep.parity(variant, plan.model_copy(update={"precision": precision}), recipe)
    assert report.ok, report.explain()


def _in_turn() -> list[tuple[str, str]]:
    others = itertools.cycle(strategy for strategy in PER_WORLD[2] if strategy != "tp")
    return [(variant, strategy) for variant in WHOLE for strategy in ("tp", *itertools.islice(others, IN_TURN))]


@pytest.mark.parametrize(("variant", "strategy"), _in_turn())
def test_two_ranks(sweep: Sweep, variant: str, strategy: str) -> None:
    _check(sweep, variant, 2, strategy)


@pytest.mark.parametrize("variant", SAMPLED)
def test_a_sample_of_two_ranks(sweep: Sweep, variant: str) -> None:
    """Tensor parallelism of every family: the layout of its matrices; and one other strategy, in turn.

    Where a model forbids one (a pipeline of several stacks), Ulysses.
    """
    possible = pure_plans(variant_spec(variant, 2), 2)
    wanted = ("tp", SOME[SAMPLED.index(variant) % len(SOME)])
    for strategy in dict.fromkeys(name if name in possible else "ulysses" for name in wanted):
        if strategy in possible:
            _check(sweep, variant, 2, strategy)
    assert possible.keys() & {*wanted, "ulysses"}


@pytest.mark.parametrize("strategy", PER_WORLD[4])
@pytest.mark.parametrize("variant", ["gpt2", "llama-tied-one-kv-head"])
def test_four_ranks(sweep: Sweep, variant: str, strategy: str) -> None:
    _check(sweep, variant, 4, strategy)


@pytest.mark.parametrize("strategy", ["dp", "zero1", "zero3", "tp", "selective", "1f1b"])
def test_two_ranks_in_fp16(sweep: Sweep, strategy: str) -> None:
    """A loss scale that is lost, or taken out twice, is off by a thousand times the largest gradient."""
    _check(sweep, "llama", 2, strategy, precision="fp16")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("variant", ["gpt2", "llama-tied-one-kv-head"])
def test_four_ranks_in_half_precisions(sweep: Sweep, variant: str, strategy: str, precision: Precision) -> None:
    _check(sweep, variant, 4, strategy, precision=precision)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("variant", NAMES)
def test_all_strategies(sweep: Sweep, variant: str, world_size: int) -> None:
    spec = variant_spec(variant, world_size)
    allowed = set(pure_plans(spec, world_size))
    few = (NEEDS_FOUR if world_size == 2 else set()) | (ONE_STACK if spec.stacks > 1 else set())
    assert set(STRATEGIES) - allowed <= few | (set() if variant in WHOLE else {"tp", "ulysses", "ring"})
    for strategy in allowed:
        _check(sweep, variant, world_size, strategy)


@pytest.mark.parametrize("strategy", ["zero1", "zero3", "tp", "1f1b"])
def test_clipping_uses_the_global_norm(sweep: Sweep, strategy: str) -> None:
    _check(sweep, "qwen2", 2, strategy, replace(sweep.recipe, max_grad_norm=0.1))


@pytest.mark.parametrize(
    ("variant", "strategy", "precision"),
    [
        ("whisper", "1f1b", "bf16"),
        ("swin", "dp", "fp16"),
        ("llava-tower-frozen", "1f1b", "bf16"),
        ("vit", "1f1b", "bf16"),
        ("vit", "tp", "fp16"),
    ],
)
def test_sounds_and_images_in_halves(sweep: Sweep, variant: str, strategy: str, precision: Precision) -> None:
    """What enters is no half, what stands in for other stages' modules must be one, and fillers are no zeros."""
    _check(sweep, variant, 2, strategy, precision=precision)


def test_ranks_with_and_without_images_gather_alike(sweep: Sweep) -> None:
    """FSDP2 gathers by which module of the embedding ran last: of a frozen tower not the same if it ran by chance."""
    _check(sweep, "qwen2_vl-tower-frozen", 4, "zero3")


def test_a_sharded_stage_between_decoders_hands_on_what_is_no_view(sweep: Sweep) -> None:
    """An encoder's states, whose hooks FSDP2 would warn that it may lose."""
    plan = pure_plans(variant_spec("t5", 6), 6, 24)["1f1b"]
    sharded = plan.layers[2].model_copy(update={"dp_replicate": 1, "dp_shard": 2, "zero": 2})
    layers = (*plan.layers[:2], sharded, plan.layers[3])
    report = sweep.parity("t5", plan.model_copy(update={"layers_per_stage": (2, 1, 1), "layers": layers}))
    assert report.ok, report.explain()


def test_convolutions_before_a_table_that_is_not_trained_are_gathered(sweep: Sweep) -> None:
    """FSDP2 waits for a gradient of what ran last in the embedding: of Whisper's first stage alone the positions."""
    sharded = LayerStrategy(dp_shard=2, zero=3)
    plan = Plan(
        model="whisper",
        world_size=4,
        layers_per_stage=(1, 3),
        num_microbatches=2,
        global_batch_size=8,
        seq_len=SEQ_LEN,
        embedding=sharded,
        layers=(sharded,) * 4,
        head=sharded,
    )
    report = sweep.parity("whisper", plan)
    assert report.ok, report.explain()
