"""Experts cut by tensor parallelism and dealt out over any axes, against one process."""

from __future__ import annotations

import pytest
import torch

from galvatron.parallelize import init_world, parallelize
from galvatron.parallelize.processes.rows import Passage
from galvatron.plan import LayerStrategy, Plan
from galvatron.plan.plan import Schedule
from galvatron.testing.models import tiny_model
from galvatron.testing.parity import parity
from galvatron.testing.plans import pure_plans, random_plans
from galvatron.testing.pool import Pool
from galvatron.testing.reference import Recipe
from galvatron.testing.sweep import Sweep, variant_spec


def plan_for(
    layers: list[LayerStrategy],
    world_size: int,
    stages: tuple[int, ...] = (4,),
    microbatches: int = 2,
    schedule: Schedule = "1f1b",
    chunks: int = 1,
) -> Plan:
    stage_size = world_size * chunks // len(stages)
    ends = LayerStrategy(dp_replicate=stage_size)
    return Plan(
        model="x", world_size=world_size, layers_per_stage=stages, embedding=ends, head=ends, layers=tuple(layers),
        num_microbatches=microbatches, global_batch_size=2 * stage_size * microbatches, seq_len=16, schedule=schedule,
        model_chunks=chunks,
    )  # fmt: skip


DEALT = LayerStrategy(ep=2, dp_replicate=2)
ZERO1, ZERO2, ZERO3 = (LayerStrategy.model_validate({"ep": 2, "dp_shard": 2, "zero": zero}) for zero in (1, 2, 3))
AGAIN = ZERO3.model_copy(update={"recompute": "full"})
SELECTIVE = DEALT.model_copy(update={"recompute": "selective"})
PLANS: dict[str, tuple[str, Plan]] = {
    "with tp, and what is left to shard over": (
        "qwen3_moe",
        plan_for(
            [
                LayerStrategy(tp=2, ep=2, dp_replicate=2, recompute="linears"),
                LayerStrategy(ep=4, dp_shard=4, zero=3),
                LayerStrategy(ep=2, dp_shard=4, zero=3, recompute="full"),
                LayerStrategy(ep=2, dp_shard=2, dp_replicate=2, zero=2),
            ],
            4,
        ),
    ),
    "over axes of the sequence": (
        "mixtral",
        plan_for(
            [
                LayerStrategy(ep=2, ulysses=2, dp_shard=2, zero=3),
                LayerStrategy(ep=2, cp=2, dp_replicate=2),
                LayerStrategy(ep=4, ulysses=2, cp=2, zero=1),
                LayerStrategy(dp_shard=4, zero=3),
            ],
            4,
        ),
    ),
}
"""Beside those that routers' own loss is tried with, below."""


@pytest.mark.parametrize("name", PLANS)
def test_experts_dealt_out(sweep: Sweep, name: str) -> None:
    family, plan = PLANS[name]
    report = sweep.parity(family, plan)
    assert report.ok, report.explain()


@pytest.mark.parametrize("strategy", [DEALT, ZERO3, LayerStrategy(tp=2)], ids=str)
def test_experts_that_nobody_asks(pool: Pool, strategy: LayerStrategy) -> None:
    """One of two experts takes every token, of which both are on one rank; the others have a gradient of zeros."""
    model = tiny_model("qwen3_moe", num_experts_per_tok=1)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.gate.weight
            weight.copy_(torch.stack([weight[0], -weight[0], *torch.zeros(2, weight.shape[1])]))
    plan = plan_for([strategy] * 4, 2)
    if strategy.tp > 1:
        plan = Plan.model_validate({**plan.model_dump(), "embedding": strategy, "head": strategy})
    report = parity(model, plan, recipe=Recipe(num_steps=2), pool=pool)
    assert report.ok, report.explain()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_whose_parts_are_no_multiple_of_16_bytes(pool: Pool, family: str) -> None:
    """torch's grouped products refuse such rows: 6 of 12 elements a tensor-parallel rank."""
    width = {"moe_intermediate_size": 12, "intermediate_size": 12}
    tp = LayerStrategy(tp=2)
    plan = Plan.model_validate({**plan_for([tp] * 4, 2).model_dump(), "embedding": tp, "head": tp})
    report = parity(tiny_model(family, **width), plan, pool=pool)
    assert report.ok, report.explain()


def what_runs_in_turn() -> tuple[list[str], list[str]]:
    """Of a layer with shared experts, dealt out: what leaves and arrives, and what is multiplied between."""
    events: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("leave", "arrive"):
            own = getattr(Passage, name)
            patch.setattr(Passage, name, lambda *args, own=own, name=name: (events.append(name), own(*args))[1])
        layers = [LayerStrategy(dp_replicate=2), LayerStrategy(ep=2, dp_replicate=2, recompute="full")]
        model = parallelize(
            tiny_model("deepseek_v3", num_hidden_layers=2), plan_for(layers, 2, (2,), 1), world=init_world("cpu")
        )
        shared = model.stages[0].model.get_submodule("model.layers.1.mlp.shared_experts.down_proj")

        def note(_: object, __: object, product: torch.Tensor) -> None:
            events.append("shared")
            if product.requires_grad:
                product.register_hook(lambda _: events.append("shared"))

        shared.register_forward_hook(note)
        tokens = torch.randint(0, 97, (4, 16), generator=torch.Generator().manual_seed(0))
        model.evaluate(tokens, tokens)
        evaluated, events[:] = [*events], []
        model.train_step(tokens, tokens)
    return evaluated, events


def test_shared_experts_run_while_tokens_travel(pool: Pool) -> None:
    """Forward; back from what comes home; forward again, as far as a backward needs it; and back."""
    beside, alone = ["leave", "shared", "arrive"], ["leave", "arrive"]
    for evaluated, trained in pool.run(what_runs_in_turn, world_size=2):
        assert evaluated == [*beside, *alone]
        assert trained == [*beside, *alone, *alone, *beside, *beside]


BALANCED: dict[str, Plan] = {
    "two ranks, recomputed": plan_for([DEALT, AGAIN, SELECTIVE, ZERO2], 2),
    "tp and rings": plan_for(
        [
            LayerStrategy(tp=2, dp_replicate=2),
            LayerStrategy(cp=2, dp_replicate=2),
            LayerStrategy(tp=2, ep=2, dp_shard=2, zero=3),
            LayerStrategy(ulysses=2, dp_replicate=2),
        ],
        4,
        microbatches=1,
    ),
    "1f1b": plan_for([ZERO3, DEALT, LayerStrategy(dp_shard=2, zero=1), ZERO2], 4, (1, 3), 3),
    "interleaved": plan_for([ZERO3, DEALT, ZERO1, AGAIN], 4, (1, 1, 1, 1), 2, "interleaved", 2),
    "zero bubble": plan_for([AGAIN, DEALT, ZERO1, ZERO2], 4, (2, 2), 3, "zero_bubble"),
}


@pytest.mark.parametrize("name", BALANCED)
def test_the_auxiliary_loss_of_routers(pool: Pool, name: str) -> None:
    """A product of sums over layers, stages and ranks, of every microbatch."""
    family = "qwen3_moe" if name == "1f1b" else "mixtral"
    model = tiny_model(family, output_router_logits=True, router_aux_loss_coef=0.5)
    report = parity(model, BALANCED[name], recipe=Recipe(num_steps=2), pool=pool)
    assert report.ok, report.explain()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe"])
def test_many_plans_with_experts_dealt_out(sweep: Sweep, variant: str, world_size: int) -> None:
    spec = variant_spec(variant, world_size)
    mixed = [p for p in random_plans(spec, world_size, 60, seed=7) if any(s.ep > 1 for s in p.layers)]
    assert len(mixed) >= 20
    pure = [plan for name, plan in pure_plans(spec, world_size).items() if name == "experts"]
    reports = [sweep.parity(variant, plan) for plan in [*pure, *mixed[:30]]]
    assert all(report.ok for report in reports), "\n".join(r.explain() for r in reports if not r.ok)
