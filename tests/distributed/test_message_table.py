"""What travels in a step is what the cost model takes time for: number and bytes of every kind, for many mixes.

The cost model is asked with links on which everything is free but one operation, that takes a second a message or a
second a byte, and a model that takes no time: its seconds are then messages, or bytes.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from functools import cache
from typing import Any

import pytest
import torch
from tests.unit.profiles import make_hardware, make_model

from galvatron.core.hardware import OPS, Op
from galvatron.core.model import ModelSpec
from galvatron.core.model_profile import ModelProfile
from galvatron.core.tasks import TOKEN_TASKS
from galvatron.cost.setting import Setting
from galvatron.cost.stages import Stage, messages_s, replicated_s, stages_of
from galvatron.models import build_spec, random_inputs
from galvatron.parallelize import init_world, parallelize
from galvatron.plan import LayerStrategy, Plan, copies
from galvatron.plan.schedules import actions
from galvatron.testing.messages import Message, Messages
from galvatron.testing.models import Variant
from galvatron.testing.plans import random_plans, usual_length
from galvatron.testing.pool import Pool
from galvatron.testing.sweep import heads_for, seq_len_for

KINDS: dict[str, Op] = {
    "all-reduce": "all_reduce",
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-to-all": "all_to_all",
    "receive": "p2p",
}
OWN = (
    Variant(name="gpt2-dropout", family="gpt2", overrides={"resid_pdrop": 0.1}),
    Variant(name="deepseek_v3", family="deepseek_v3", overrides={"num_experts_per_tok": 4, "topk_group": 2}),
)
"""Of no other table: dropout is not compared with one process's, and routers here leave out no expert."""
NOT_COSTED = {("all-reduce", 4), ("all-reduce", 16)}
"""The loss of a step; and ranks compare their batches now and then."""
Totals = dict[Op, tuple[int, int]]
"""Of each operation, messages and bytes."""


def named(variant: str) -> Variant:
    return next((own for own in OWN if own.name == variant), None) or Variant.named(variant)


def sent(variant: str, plan: Plan, capacity_factor: float | None = None) -> list[Message]:
    """Of a second step: FSDP2 prepares itself in the first."""
    whole = named(variant).model(heads_for(plan.world_size), smooth=True)
    model = parallelize(whole, plan, world=init_world("cpu"), capacity_factor=capacity_factor)
    task, rows = model.spec.task, plan.global_batch_size
    batch = random_inputs(model.config, task, rows, plan.seq_len, torch.Generator().manual_seed(0))
    if task != "contrast":
        shape = (rows, plan.seq_len) if task in TOKEN_TASKS else (rows,)
        batch["labels"] = torch.zeros(shape, dtype=torch.int64)
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


def costed(variant: str, plan: Plan, capacity_factor: float | None = None) -> list[Totals]:
    """By stage."""
    spec = spec_of(variant, plan.world_size)
    model = instant(make_model(spec, plan.seq_len)).with_capacity(capacity_factor)
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
        for at, summed in shared_bytes(plan, spec).items() if plan.pp > 2 else ():
            n, b = stage["all_reduce"]
            stage["all_reduce"] = (n + (index in at), b + summed * (index in at))
    return stages


def vectors_that_came_before(plan: Plan, spec: ModelSpec, stage: int) -> int:
    """Under zero bubble a stage's first weight passes bring more than one microbatch's norms and biases, its last none.

    The cost model, which does not know of a unit in which stage it is, takes all weight passes as equal.
    """
    if plan.schedule != "zero_bubble":
        return 0
    sent, kinds = 0, spec.kind_of_layers()
    for chunk in range(plan.model_chunks):
        of_chunk = 0
        for layer in plan.chunk_layers(stage, chunk):
            strategy = plan.layers[layer]
            vectors = [p.local_shape(strategy.tp) for p in kinds[layer].parameters if p.trainable and len(p.shape) == 1]
            of_chunk += 4 * sum(map(math.prod, vectors)) * (strategy.zero >= 2 and strategy.dp_replicate == 1)
        sent += of_chunk * passes_without(plan, stage, chunk)
    return sent


def passes_without(plan: Plan, stage: int, chunk: int) -> int:
    """Weight passes of a chunk with no backward since its last one."""
    order = actions(plan.schedule, plan.pp, stage, plan.num_microbatches, plan.model_chunks)
    kinds = [action.kind for action in order if action.chunk == chunk and action.kind != "forward"]
    return sum(a == b == "weight" for a, b in itertools.pairwise(kinds))


def shared_bytes(plan: Plan, spec: ModelSpec) -> dict[tuple[int, ...], int]:
    """Of sums over some of several stages, whose links no profile has: they are costed as messages."""
    found: dict[tuple[int, ...], int] = defaultdict(int)
    for (layer, name), at in copies(spec, plan).items():
        parameters = spec.embedding.parameters if layer is None else spec.kind_of_layers()[layer].parameters
        shape = next(p for p in parameters if p.name == name).local_shape(plan.embedding.tp if layer is None else 1)
        shards = plan.embedding.shard_degree if layer is None else 1
        found[at] += 4 * -(-shape[0] // shards) * math.prod(shape[1:])
    return found


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
    found = plan.num_microbatches * every + replicated_s(plan, setting, stage)
    found += sum(float(getattr(unit, name)) for unit in stage.times for name in once)
    assert found == pytest.approx(round(found), abs=1e-6)
    return round(found)


@cache
def spec_of(variant: str, world_size: int) -> ModelSpec:
    """With all experts chosen, so that what travels does not depend on values."""
    found = named(variant)
    return build_spec(found.config(heads_for(world_size), smooth=True), variant, found.freeze, found.lora)


def mixes(variant: str, world_size: int, count: int, seed: int = 2026) -> list[Plan]:
    spec = spec_of(variant, world_size)
    seq_len = usual_length(spec) if spec.task == "image_classification" else seq_len_for(world_size)
    return random_plans(spec, world_size, count, seed, seq_len)


def plan_of(ends: LayerStrategy, *layers: LayerStrategy) -> Plan:
    """Two microbatches of one stage."""
    return Plan(
        model="tiny", world_size=ends.num_devices, layers_per_stage=(len(layers),), num_microbatches=2, embedding=ends,
        head=ends, layers=layers, global_batch_size=8, seq_len=16,
    )  # fmt: skip


SAMPLES = (("llama", 4, 0), ("llama", 4, 1), ("gpt2", 4, 1), ("qwen2", 4, 4))
"""Of the default run: zero bubble, GPipe, replicas of shards, tied ends."""
COUNTS = {
    "llama": {2: 8, 4: 12, 8: 3}, "gpt2": {4: 8}, "qwen2": {4: 8}, "phi3": {4: 3}, "gpt_neox": {4: 3}, "opt": {4: 2},
    "cohere": {4: 2}, "qwen3": {4: 3}, "mistral": {4: 2},
}  # fmt: skip


def check(pool: Pool, variant: str, plan: Plan, capacity_factor: float | None = None) -> None:
    expected = costed(variant, plan, capacity_factor)
    found = pool.run(sent, variant, plan, capacity_factor, world_size=plan.world_size)
    for stage, own in enumerate(expected):
        assert totals(found[stage * plan.stage_size]) == own, f"stage {stage} of\n{plan.describe()}"


def test_messages_of_weight_passes_in_chunks(pool: Pool) -> None:
    """Shards whose norms come before, with and after the weight passes that reduce them."""
    two, three = (LayerStrategy.model_validate({"dp_shard": 2, "zero": zero}) for zero in (2, 3))
    plan = Plan(
        model="llama", world_size=4, layers_per_stage=(2, 1, 1, 1), schedule="zero_bubble", model_chunks=2,
        num_microbatches=4, global_batch_size=16, seq_len=16, embedding=two, layers=(two, three, three, two, two),
        head=two,
    )  # fmt: skip
    check(pool, "llama", plan)


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


@pytest.mark.parametrize("variant", ["bert", "olmo2", "gpt2-dropout"])
def test_what_layers_run_again_whose_output_something_follows(pool: Pool, variant: str) -> None:
    """A norm or dropout: its input, the sum of the last region, is kept by all levels but the last."""
    cut, levels = LayerStrategy(tp=2), ("selective", "mlp", "linears", "full")
    plan = plan_of(cut, *(cut.model_copy(update={"recompute": level}) for level in levels))
    check(pool, variant, plan)


def test_layers_of_one_layout_share_what_they_see_of_another_stack(pool: Pool) -> None:
    """One all-to-all, though FSDP2 hands the layers that it shards tensors of their own."""
    ends, one = LayerStrategy(dp_replicate=2), LayerStrategy(dp_shard=2, zero=3)
    sharded = LayerStrategy(ulysses=2, zero=3, recompute="selective")
    check(pool, "t5", plan_of(ends, ends, one, sharded, LayerStrategy(tp=2, recompute="linears")))


def test_a_ring_and_regions_of_latent_attention_with_shared_experts(pool: Pool) -> None:
    """Keys and values go round as wide as heads are, not as latents; shared experts are a region of their own."""
    ring, ends = LayerStrategy(cp=2), LayerStrategy(ulysses=2)
    again = [ring.model_copy(update={"recompute": level}) for level in ("selective", "full")]
    check(pool, "deepseek_v3", plan_of(ends, ring, *again, LayerStrategy(tp=2, recompute="full")))


def test_sharded_experts_that_are_dealt_out_run_again(pool: Pool) -> None:
    """Experts and the layer around them are two groups of FSDP2, each gathered for every pass, each reduced apart."""
    dealt = LayerStrategy(ep=2, dp_shard=2, zero=3)
    levels = ("none", "selective", "mlp", "full")
    layers = [dealt.model_copy(update={"recompute": level}) for level in levels]
    check(pool, "mixtral", plan_of(LayerStrategy(dp_replicate=2), *layers))


def test_what_nothing_takes_is_not_run(pool: Pool) -> None:
    """A tower's states are taken before its last layer: that sends nothing, and the others end as any other does."""
    cut, sharded = LayerStrategy(tp=2), LayerStrategy(dp_shard=2, zero=3)
    check(pool, "llava", plan_of(cut, sharded, cut, sharded, LayerStrategy(ulysses=2), cut))


def test_full_experts_send_what_is_costed(pool: Pool) -> None:
    """Of two ranks the first one fills all experts: it sends as many tokens as without a capacity, and gets half."""
    both = LayerStrategy(ep=2, dp_replicate=2)
    layers = (both, LayerStrategy(ep=2, ulysses=2), LayerStrategy(tp=2), both.model_copy(update={"recompute": "full"}))
    check(pool, "mixtral", plan_of(LayerStrategy(dp_replicate=2), *layers), 0.5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("variant", COUNTS)
def test_messages_of_many_mixes(pool: Pool, variant: str) -> None:
    for world_size, count in COUNTS[variant].items():
        for plan in mixes(variant, world_size, count):
            check(pool, variant, plan)
