"""A model that nobody holds any more leaves no weights behind: those who build one after another need the memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from galvatron.core.model import Precision
from galvatron.parallelize import World, init_world, parallelize
from galvatron.plan import Plan
from galvatron.testing import Pool
from galvatron.testing.models import Variant
from galvatron.testing.plans import pure_plans, random_plans
from galvatron.testing.reference import Recipe, make_batches
from galvatron.testing.sweep import variant_spec


def trained_and_dropped(variant: str, plan: Plan, world: World) -> list[weakref.ref[torch.Tensor]]:
    """Train a rank of ``plan`` for two steps; references to what the modules had and to what was optimised."""
    model = Variant.named(variant).model()
    batches = make_batches(Recipe(num_steps=2), model.config, plan.global_batch_size, plan.seq_len)
    trained = parallelize(model, plan, world=world, compile=False)
    optimizer = torch.optim.AdamW([p.tensor for p in trained.local_parameters])
    for inputs, labels in batches:
        trained.train_step(labels=labels, **inputs)
        trained.clip_grad_norm_(None)
        optimizer.step()
        trained.zero_grad()
    return [weakref.ref(p) for p in (*trained.parameters(), *(p.tensor for p in trained.local_parameters))]


def left_by(variant: str, plan: Plan) -> int:
    """How many parameters are still there after ``plan`` was run on a fake world and dropped."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=plan.world_size)
    try:
        return left_in(World(0, plan.world_size, 0, torch.device("cpu"), "gloo"), variant, plan)
    finally:
        dist.destroy_process_group()


def left_in(world: World, variant: str, plan: Plan) -> int:
    references = trained_and_dropped(variant, plan, world)
    gc.collect()
    return sum(reference() is not None for reference in references)


def left_on_rank(variant: str, plan: Plan) -> int:
    return left_in(init_world("cpu"), variant, plan)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["full", "zero3", "tp", "ring", "offload", "1f1b", "interleaved", "zero_bubble"])
def test_what_is_dropped_is_freed(name: str, precision: Precision) -> None:
    plan = pure_plans(variant_spec("llama", 2), 2)[name]
    assert left_by("llama", plan.model_copy(update={"precision": precision})) == 0


@pytest.mark.parametrize(("variant", "place"), [("t5", 0), ("llama", 2)])
def test_mixes_that_are_dropped_are_freed(variant: str, place: int) -> None:
    """T5 with what all its decoder's layers see, beside FSDP2; zero bubble beside it."""
    assert left_by(variant, random_plans(variant_spec(variant, 2), 2, 3, seed=1)[place]) == 0


def test_experts_that_are_dropped_are_freed(pool: Pool) -> None:
    """On ranks that there are: how many tokens travel is told by others, and a fake world tells nothing."""
    plan = random_plans(variant_spec("mixtral", 4), 4, 3, seed=1)[2]
    assert any(layer.ep > 1 for layer in plan.layers)
    assert pool.run(left_on_rank, "mixtral", plan, world_size=4) == [0, 0, 0, 0]
