"""A model that nobody holds any more leaves no weights behind: those who build one after another need the memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from galvatron.core.model import Precision
from galvatron.parallelize import World, parallelize
from galvatron.plan import Plan
from galvatron.testing.models import tiny_model
from galvatron.testing.plans import pure_plans
from galvatron.testing.reference import Recipe, make_batches
from galvatron.testing.sweep import variant_spec


def trained_and_dropped(plan: Plan, precision: Precision) -> list[weakref.ref[torch.Tensor]]:
    """Train rank 0 of ``plan`` for two steps; references to what the modules had and to what was optimised."""
    model = tiny_model("llama", num_hidden_layers=5)
    batches = make_batches(Recipe(num_steps=2), model.config, plan.global_batch_size, plan.seq_len)
    plan, place = plan.model_copy(update={"precision": precision}), torch.device("cpu")
    trained = parallelize(model, plan, world=World(0, plan.world_size, 0, place, "gloo"), compile=False)
    optimizer = torch.optim.AdamW([p.tensor for p in trained.local_parameters])
    for inputs, labels in batches:
        trained.train_step(inputs["input_ids"], labels)
        trained.clip_grad_norm_(None)
        optimizer.step()
        trained.zero_grad()
    return [weakref.ref(p) for p in (*trained.parameters(), *(p.tensor for p in trained.local_parameters))]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["full", "zero3", "tp", "ring", "offload", "1f1b", "interleaved", "zero_bubble"])
def test_what_is_dropped_is_freed(name: str, precision: Precision) -> None:
    plan = pure_plans(variant_spec("llama", 2), 2)[name]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        left = trained_and_dropped(plan, precision)
        gc.collect()
        assert sum(reference() is not None for reference in left) == 0
    finally:
        dist.destroy_process_group()
