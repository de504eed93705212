"""What travels in a training step, and in which order: closed forms of the plan, and no clock.

Numbers are of LLaMA with two layers: H hidden, V vocabulary rows, float32 elements of 4 bytes.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.profiles import make_hardware, make_model

from galvatron.core.hardware import Link
from galvatron.core.model import ModelSpec, Recompute
from galvatron.cost.setting import Setting
from galvatron.cost.stages import messages_s, stages_of
from galvatron.cost.unit import unit_times
from galvatron.models import build_spec
from galvatron.parallelize import init_world, parallelize
from galvatron.plan import LayerStrategy, Plan
from galvatron.plan.plan import Schedule
from galvatron.testing.messages import Message, Messages
from galvatron.testing.models import tiny_config, tiny_model
from galvatron.testing.pool import Pool
from galvatron.testing.slow import SlowCollectives, before_messages

ROWS, SEQ_LEN = 4, 16
"""Sequences a microbatch, and their tokens."""
DP2, TP2, ZERO3 = LayerStrategy(dp_replicate=2), LayerStrategy(tp=2), LayerStrategy(dp_shard=2, zero=3)


def plan_for(
    strategy: LayerStrategy,
    stages: tuple[int, ...] = (2,),
    microbatches: int = 1,
    schedule: Schedule = "1f1b",
    chunks: int = 1,
    ends: LayerStrategy | None = None,
) -> Plan:
    ends = ends or strategy
    return Plan(
        model="tiny", world_size=strategy.num_devices * len(stages) // chunks, layers_per_stage=stages,
        embedding=ends, head=ends, layers=(strategy,) * sum(stages), num_microbatches=microbatches,
        global_batch_size=ROWS * microbatches, seq_len=SEQ_LEN, schedule=schedule, model_chunks=chunks,
    )  # fmt: skip


def messages(plan: Plan, family: str = "llama", overrides: dict[str, int] | None = None) -> list[Message]:
    """Of a second step: FSDP2 prepares itself in the first."""
    whole = tiny_model(family, num_hidden_layers=len(plan.layers), **(overrides or {}))
    model = parallelize(whole, plan, world=init_world("cpu"))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.spec.vocab_size, (plan.global_batch_size, SEQ_LEN + 1), generator=generator)
    model.train_step(tokens[:, :-1], tokens[:, 1:])
    with Messages() as log:
        model.train_step(tokens[:, :-1], tokens[:, 1:])
    return log.started


CONFIG = tiny_config("llama", num_hidden_layers=2)
H, V = CONFIG.hidden_size, CONFIG.vocab_size
KV = CONFIG.num_key_value_heads * H // CONFIG.num_attention_heads
EMBEDDING = 4 * V * H
LAYER = 4 * (2 * H * H + 2 * H * KV + 3 * H * CONFIG.intermediate_size + 2 * H)
HEAD = 4 * (V * H + H)
HIDDEN = 4 * ROWS * SEQ_LEN * H
"""Bytes of a microbatch's hidden states, on all ranks together."""
LOSS: Counter[Message] = Counter({("all-reduce", 4): 1})
"""The loss of the step, over the world."""
BATCH_CHECK = {("all-reduce", 16)}
"""Ranks compare their batches now and then."""


def counted(messages: list[Message]) -> Counter[Message]:
    return Counter(message for message in messages if message not in BATCH_CHECK)


def even(num_bytes: int, rows: int) -> int:
    """``num_bytes`` in ``rows`` rows with one more, where two shards cannot have equally many."""
    return num_bytes if rows % 2 == 0 else num_bytes // rows * (rows + 1)


def test_replicas_sum_every_unit_once(pool: Pool) -> None:
    expected = LOSS + Counter([("all-reduce", unit) for unit in (EMBEDDING, LAYER, LAYER, HEAD)])
    for found in pool.run(messages, plan_for(DP2, microbatches=3), world_size=2):
        assert counted(found) == expected


def test_tensor_parallel_ranks_gather_and_scatter_twice_a_layer(pool: Pool) -> None:
    # forward: the embedding's sum is scattered, attention and MLP gather and scatter, the head gathers; backward: the
    # adjoint of each.  The loss takes the largest logit of every token, then its three sums; the rest is the gradients
    # of five norms that both ranks hold.
    around = 1 + 2 * 2
    expected = LOSS + Counter(
        {
            ("all-gather", HIDDEN): 2 * around,
            ("reduce-scatter", HIDDEN): 2 * around,
            ("all-reduce", 4 * ROWS * SEQ_LEN): 1,
            ("all-reduce", 3 * 4 * ROWS * SEQ_LEN): 1,
            ("all-reduce", 4 * 5 * H): 1,
        }
    )
    for found in pool.run(messages, plan_for(TP2), world_size=2):
        assert counted(found) == expected


EVERY = {"num_local_experts": 4, "num_experts_per_tok": 4}
"""Every token goes to all experts, so that what travels does not depend on values."""


@pytest.mark.parametrize(
    "strategy", [TP2, LayerStrategy(ep=2, dp_replicate=2), LayerStrategy(tp=2, ep=2, dp_replicate=2)], ids=str
)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_experts_are_sent_what_they_are_costed_at(pool: Pool, strategy: LayerStrategy, recompute: Recompute) -> None:
    """Tokens once to each of ep ranks with their routes, gathered there over tp, and sums back; and the adjoint."""
    ranks, layers, tp, ep = strategy.num_devices, 2, strategy.tp, strategy.ep
    again = int(recompute == "full")
    plan = plan_for(strategy.model_copy(update={"recompute": recompute}), ends=strategy.model_copy(update={"ep": 1}))
    hidden = HIDDEN // strategy.dp * ep  # of the rows that a tensor-parallel group receives
    routes = hidden // H * 2 * EVERY["num_experts_per_tok"]
    expected: Counter[Message] = Counter()
    if ep > 1:
        expected["all-to-all", (hidden + routes) // tp] += layers * (2 + again)
        expected["all-to-all", hidden // tp] += layers * 2
        expected["all-gather", 8 * ranks * ep] += layers * (1 + again)
    if tp > 1:
        for kind in ("all-gather", "reduce-scatter"):
            expected[kind, routes] += layers * (1 + (again and kind == "all-gather"))
            expected[kind, hidden] += layers * (2 + (again and kind == "all-gather"))
    for found in pool.run(messages, plan, "mixtral", EVERY, world_size=ranks):
        there, of_attention = counted(found), HIDDEN // strategy.dp
        told_apart = {message: n for message, n in expected.items() if message[1] != of_attention}
        assert {message: there[message] for message in told_apart} == told_apart
        assert {m for m in there if m[0] == "all-to-all"} == {m for m in expected if m[0] == "all-to-all"}
    costed = costed_bytes(strategy, build_spec(tiny_config("mixtral", num_hidden_layers=2, **EVERY)), "experts")
    kinds = {"all-to-all": "all_to_all", "all-gather": "all_gather", "reduce-scatter": "reduce_scatter"}
    for kind, op in kinds.items():
        assert costed[op] == {size for name, size in expected if name == kind}


@pytest.mark.parametrize(("schedule", "m", "of_head"), [("1f1b", 1, 1), ("1f1b", 3, 3), ("gpipe", 3, 6)])
def test_zero_3_gathers_a_layer_for_each_direction_and_ends_once(
    pool: Pool, schedule: str, m: int, of_head: int
) -> None:
    # the embedding's backward needs no value; the head's begins where its forward ends, but under GPipe
    embedding, head = even(EMBEDDING, V), even(HEAD - 4 * H, V) + 4 * H
    plan = plan_for(ZERO3, microbatches=m).model_copy(update={"schedule": schedule})
    expected = LOSS + Counter(
        {("all-gather", embedding): m, ("all-gather", LAYER): 2 * 2 * m, ("all-gather", head): of_head}
    )
    for unit in (embedding, LAYER, LAYER, head):
        expected["reduce-scatter", unit] += m
    if schedule == "gpipe":  # the projection's gradient is whole, and comes, with the last
        expected["reduce-scatter", head] = 1
        expected["reduce-scatter", 4 * H] = m - 1
    for found in pool.run(messages, plan, world_size=2):
        assert counted(found) == expected


@pytest.mark.parametrize(("ulysses", "cp"), [(2, 1), (4, 1), (1, 2), (1, 4), (2, 2)])
def test_attention_across_ranks_sends_what_it_is_costed_at(pool: Pool, ulysses: int, cp: int) -> None:
    # around attention an exchange brings queries, keys and values and one takes the output back, both ways; keys and
    # values go round the ring, in backward with their gradients
    strategy, ranks, layers = LayerStrategy(ulysses=ulysses, cp=cp), ulysses * cp, 2
    dealt = max(CONFIG.num_key_value_heads, ulysses) * H // CONFIG.num_attention_heads
    enters, leaves, passed = HIDDEN * (H + 2 * dealt) // H // ranks, HIDDEN // ranks, HIDDEN * 2 * dealt // H // ranks
    expected = LOSS + Counter([("all-reduce", unit) for unit in (EMBEDDING, LAYER, LAYER, HEAD)])
    if ulysses > 1:
        expected += Counter({("all-to-all", enters): 2 * layers, ("all-to-all", leaves): 2 * layers})
    if cp > 1:
        hops = 3 * (cp - 1) * layers
        expected += Counter({("send", passed): hops, ("receive", passed): hops})
    for found in pool.run(messages, plan_for(strategy, ends=LayerStrategy(ulysses=ranks)), world_size=ranks):
        assert counted(found) == expected
    costed = costed_bytes(strategy)
    assert costed["all_to_all"] == ({enters, leaves} if ulysses > 1 else set())
    assert costed["p2p"] == ({passed} if cp > 1 else set())


def costed_bytes(
    strategy: LayerStrategy, spec: ModelSpec | None = None, around: str = "sequence"
) -> dict[str, set[int]]:
    """Of the messages around a layer's attention, or its experts, as the cost model has them."""
    sent: dict[str, set[int]] = {op: set() for op in ("all_to_all", "p2p", "all_gather", "reduce_scatter")}

    def log(setting: Setting, op: str, size: Any, stride: Any, num_bytes: Any) -> Any:
        if op in sent and np.all(size > 1):
            sent[op] |= set(num_bytes.astype(int).tolist())
        return num_bytes

    model, hardware = make_model(spec or build_spec(CONFIG), SEQ_LEN, (1, 2)), make_hardware(strategy.num_devices)
    setting = Setting(model, hardware, 1, 1, ROWS, SEQ_LEN, "fp32", "fp32")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(f"galvatron.cost.{around}.collective_s", log)
        unit_times(setting, "layer", strategy)
    return sent


def test_stages_exchange_hidden_states_and_gradients_once_a_microbatch(pool: Pool) -> None:
    first, last = ("send", HIDDEN // 2), ("receive", HIDDEN // 2)
    for rank, found in enumerate(pool.run(messages, plan_for(DP2, (1, 1), 2), world_size=4)):
        end = EMBEDDING if rank < 2 else HEAD
        assert counted(found) == LOSS + Counter({first: 2, last: 2, ("all-reduce", LAYER): 1, ("all-reduce", end): 1})


ALONE = LayerStrategy()
SCHEDULES: dict[str, Plan] = {
    "1f1b, 2 stages of 2 ranks": plan_for(DP2, (1, 1), 3),
    "zero bubble, 4 stages": plan_for(ALONE, (1, 2, 1, 1), 5, "zero_bubble"),
    "interleaved, 2 stages of 2 ranks": plan_for(TP2, (1, 2, 1, 1), 2, "interleaved", 2),
    "interleaved, 4 stages": plan_for(ALONE, (1,) * 8, 4, "interleaved", 2),
    "zero bubble, 2 stages of 2 chunks": plan_for(TP2, (1, 2, 1, 1), 4, "zero_bubble", 2),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_messages_between_stages_are_those_that_the_cost_model_counts(pool: Pool, name: str) -> None:
    plan = SCHEDULES[name]
    hardware = make_hardware(plan.world_size)
    a_byte_a_second = [Link(op="p2p", size=2, stride=plan.stage_size, latency_s=0.0, seconds_per_byte=1.0)]
    others = [link for link in hardware.links if (link.op, link.stride) != ("p2p", plan.stage_size)]
    hardware = hardware.model_copy(update={"links": (*others, *a_byte_a_second)})
    model = make_model(build_spec(tiny_config("llama", num_hidden_layers=len(plan.layers))), SEQ_LEN)
    stages = stages_of(plan, Setting.of(plan, model, hardware))
    for rank, found in enumerate(pool.run(messages, plan, world_size=plan.world_size)):
        received = [size for kind, size in found if kind == "receive"]
        expected = list(messages_s(stages, rank // plan.stage_size))
        assert len(received) == plan.num_microbatches * len(expected)
        assert sum(received) == plan.num_microbatches * sum(expected)
        assert Counter(kind for kind, _ in found)["send"] == len(received)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_gradient_leaves_before_its_layers_own_are_reduced(pool: Pool, zero: int, recompute: str) -> None:
    shape = {"dp_shard": 2} if zero else {"dp_replicate": 2}
    strategy = LayerStrategy.model_validate({**shape, "zero": zero, "recompute": recompute})
    plan = plan_for(strategy.model_copy(update={"recompute": "none"}), (1, 1), 2)
    plan = Plan.model_validate({**plan.model_dump(), "layers": (strategy, strategy)})
    reduced = "reduce-scatter" if zero else "all-reduce"
    for found in pool.run(messages, plan, world_size=4)[2:]:
        order = [kind if kind == "send" else size for kind, size in found if kind in ("send", reduced)]
        assert order.count("send") == 2
        reductions = [index for index, what in enumerate(order) if what == LAYER]
        assert len(reductions) == (2 if zero >= 2 else 1)
        for nth, index in enumerate(reversed(reductions)):
            assert order[:index].count("send") == 2 - nth  # that of the same microbatch is on its way


def waits(plan: Plan) -> list[str]:
    """What this rank of a slowed step waits for before each message, and after the last."""
    model = parallelize(
        tiny_model("llama", num_hidden_layers=sum(plan.layers_per_stage)), plan, world=init_world("cpu")
    )
    tokens = torch.zeros(plan.global_batch_size, SEQ_LEN, dtype=torch.int64)
    model.train_step(tokens, tokens)
    with SlowCollectives(0.01) as slow:
        model.train_step(tokens, tokens)
    return before_messages(slow.events)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_messages_wait_for_nothing_but_what_fsdp2_reduces_in_their_own_backward(pool: Pool, zero: int) -> None:
    """Two stages of two layers and two microbatches: forward, forward, and a gradient back of each."""
    strategy = LayerStrategy(dp_shard=2, zero=zero) if zero else LayerStrategy(dp_replicate=2)
    first, *_, last = pool.run(waits, plan_for(strategy, (2, 2), 2), world_size=4)
    *before, after = last
    sums = [line.count("sum") for line in before]
    if zero < 2:
        # with the first message at most what is gathered for the step; all sums after the last
        assert [*before, *first[:-1]] in (
            [*(4 * ["send"])],
            [3 * "gather " + "send", "send", 3 * "gather " + "send", "send"],
        )
        assert after.split() == first[-1].split() == 3 * ["sum"]
    else:
        # of the head and the layer behind the first; then of the first layer, of the microbatch before
        assert sums == [2, 3]
        assert after.count("sum") == 1
        assert not any("sum" in line for line in first[:-1])
