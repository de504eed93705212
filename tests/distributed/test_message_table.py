"""What travels in a step is what the cost model takes time for: number and bytes of every kind, for many mixes.

The cost model is asked with links on which everything is free but one operation, that takes a second a message or a
second a byte, and a model that takes no time: its seconds are then messages, or bytes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from tests.unit.profiles import make_hardware, make_model

from galvatron.core.hardware import OPS, Op
from galvatron.core.model import ModelSpec
from galvatron.core.model_profile import ModelProfile
from galvatron.cost.setting import Setting
from galvatron.cost.stages import Stage, messages_s, replicated_s, stages_of
from galvatron.models import random_inputs
from galvatron.parallelize import init_world, parallelize
from galvatron.plan import LayerStrategy, Plan, copies
from galvatron.testing.messages import Message, Messages
from galvatron.testing.models import Variant
from galvatron.testing.plans import random_plans
from galvatron.testing.pool import Pool
from galvatron.testing.sweep import heads_for, seq_len_for, variant_spec

KINDS: dict[str, Op] = {
    "all-reduce": "all_reduce",
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-to-all": "all_to_all",
    "receive": "p2p",
}
NOT_COSTED = {("all-reduce", 4), ("all-reduce", 16)}
"""The loss of a step; and ranks compare their batches now and then."""
Totals = dict[Op, tuple[int, int]]
"""Of each operation, messages and bytes."""


def sent(variant: str, plan: Plan) -> list[Message]:
    """Of a second step: FSDP2 prepares itself in the first."""
    model = parallelize(Variant.named(variant).model(heads_for(plan.world_size)), plan, world=init_world("cpu"))
    task, rows = model.spec.task, plan.global_batch_size
    batch = random_inputs(model.config, task, rows, plan.seq_len, torch.Generator().manual_seed(0))
    if task != "contrast":
        batch["labels"] = torch.zeros(rows, plan.seq_len, dtype=torch.int64)
    model.train_step(**batch)
    with Messages() as log:
        model.train_step(**batch)
    return log.started


def totals(messages: list[Message]) -> Totals:
    found: dict[Op, list[int]] = defaultdict(list)
    for kind, num_bytes in messages:
        if kind in KINDS and (kind, num_bytes) not in NOT_COSTED:
            found[KINDS[kind]].append(num_bytes)
    return {op: (len(found[op]), sum(found[op])) for op in OPS}


def costed(variant: str, plan: Plan) -> list[Totals]:
    """By stage."""
    spec = variant_spec(variant, plan.world_size)
    model = instant(make_model(spec, plan.seq_len))
    stages: list[Totals] = [{} for _ in range(plan.pp)]
    for op in OPS:
        number, num_bytes = (
            seconds(plan, model, op, **link) for link in ({"latency_s": 1.0}, {"seconds_per_byte": 1.0})
        )
        for stage, n, b in zip(stages, number, num_bytes, strict=True):
            stage[op] = (n, b)
    for index, stage in enumerate(stages):
        n, b = stage["reduce_scatter"]
        stage["reduce_scatter"] = (n, b - vectors_that_came_before(plan, spec, index))
        if spec.tied_embeddings and plan.pp > 2 and index in (0, plan.pp - 1):
            n, b = stage["all_reduce"]
            stage["all_reduce"] = (n + 1, b + tied_bytes(plan, spec))
    for key, users in copies(spec, plan).items():
        for index in users if key[0] is not None else ():
            n, b = stages[index]["all_reduce"]
            stages[index]["all_reduce"] = (n, b + scores_bytes(spec, *key))
    return stages


def vectors_that_came_before(plan: Plan, spec: ModelSpec, stage: int) -> int:
    """Under zero bubble stage p's first weight pass brings p microbatches' norms and biases too, and its last p none.

    The cost model, which does not know of a unit in which stage it is, takes all weight passes as equal.
    """
    if plan.schedule != "zero_bubble":
        return 0
    sent, kinds = 0, spec.kind_of_layers()
    for layer in plan.chunk_layers(stage):
        strategy = plan.layers[layer]
        vectors = [p.local_shape(strategy.tp) for p in kinds[layer].parameters if p.trainable and len(p.shape) == 1]
        sent += 4 * sum(map(math.prod, vectors)) * (strategy.zero >= 2 and strategy.dp_replicate == 1)
    return sent * min(stage, plan.num_microbatches - 1)


def tied_bytes(plan: Plan, spec: ModelSpec) -> int:
    """Of the sum over the first and the last of several stages, whose link no profile has: it is costed as messages."""
    rows, width = spec.embedding.parameters[0].local_shape(plan.embedding.tp)
    return 4 * -(-rows // plan.embedding.shard_degree) * width


def scores_bytes(spec: ModelSpec, layer: int | None, name: str) -> int:
    """Of a table of scores that layers on several stages look up, which is too small to be costed.

    Its gradient goes with the tied weight's, which tests of it have.
    """
    assert layer is not None
    return 4 * sum(math.prod(p.shape) for p in spec.kind_of_layers()[layer].parameters if p.name == name)


def instant(model: ModelProfile) -> ModelProfile:
    """``model`` with compute that takes no time."""
    nothing: dict[str, Any] = {"forward_s": 0.0, "backward_s": 0.0}
    compute = (s.model_copy(update={**nothing, "again_s": dict.fromkeys(s.again_s, 0.0)}) for s in model.compute)
    return model.model_copy(update={"compute": tuple(compute), "optimizer_s_per_parameter": 0.0})


def seconds(plan: Plan, model: ModelProfile, op: Op, **link: float) -> list[int]:
    """By stage, of a step of which all but ``op`` is free."""
    hardware = make_hardware(plan.world_size, host_bytes_per_s=4e9)
    free = {"latency_s": 0.0, "seconds_per_byte": 0.0}
    links = tuple(own.model_copy(update={**free, **(link if own.op == op else {})}) for own in hardware.links)
    setting = Setting.of(plan, model, hardware.model_copy(update={"links": links}))
    stages = stages_of(plan, setting)
    return [_seconds(plan, setting, stages, index) for index in range(plan.pp)]


def _seconds(plan: Plan, setting: Setting, stages: tuple[Stage, ...], index: int) -> int:
    stage = stages[index]
    once = ("first_s", "last_s", "delayed_s", *(("tied_s",) if plan.pp == 2 else ()))
    every = stage.forward_s + stage.backward_s + sum(messages_s(stages, index))
    found = plan.num_microbatches * every + replicated_s(setting, stage)
    found += sum(float(getattr(unit, name)) for unit in stage.times for name in once)
    assert found == pytest.approx(round(found), abs=1e-6)
    return round(found)


def mixes(variant: str, world_size: int, count: int) -> list[Plan]:
    return random_plans(variant_spec(variant, world_size), world_size, count, 2026, seq_len_for(world_size))


SAMPLES = (("llama", 4, 0), ("llama", 4, 1), ("gpt2", 4, 1), ("qwen2", 4, 4))
"""Of the default run: zero bubble, GPipe, replicas of shards, tied ends."""
COUNTS = {
    "llama": {2: 8, 4: 12, 8: 3}, "gpt2": {4: 8}, "qwen2": {4: 8}, "phi3": {4: 3}, "gpt_neox": {4: 3}, "opt": {4: 2},
    "cohere": {4: 2}, "qwen3": {4: 3}, "mistral": {4: 2},
}  # fmt: skip


def check(pool: Pool, variant: str, plan: Plan) -> None:
    expected = costed(variant, plan)
    found = pool.run(sent, variant, plan, world_size=plan.world_size)
    for stage, own in enumerate(expected):
        assert totals(found[stage * plan.stage_size]) == own, f"stage {stage} of\n{plan.describe()}"


@pytest.mark.parametrize(("variant", "world_size", "index"), SAMPLES)
def test_messages_are_those_that_are_costed(pool: Pool, variant: str, world_size: int, index: int) -> None:
    check(pool, variant, mixes(variant, world_size, index + 1)[index])


@pytest.mark.parametrize(
    ("variant", "stages", "microbatches"), [("t5", (3, 1), 4), ("t5", (2, 2), 2), ("clip", (4, 1), 1)]
)
def test_what_rides_along_between_stacks_is_costed(
    pool: Pool, variant: str, stages: tuple[int, ...], microbatches: int
) -> None:
    """A decoder's stages get the encoder's output as a message of its own, a second tower's what the first came to."""
    one = LayerStrategy()
    plan = Plan(
        model="tiny", world_size=2, layers_per_stage=stages, num_microbatches=microbatches, embedding=one, head=one,
        layers=(one,) * sum(stages), global_batch_size=8, seq_len=16,
    )  # fmt: skip
    check(pool, variant, plan)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("variant", COUNTS)
def test_messages_of_many_mixes(pool: Pool, variant: str) -> None:
    for world_size, count in COUNTS[variant].items():
        for plan in mixes(variant, world_size, count):
            check(pool, variant, plan)
