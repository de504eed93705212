"""Plans to test with: every pure strategy, and seeded random mixes.

Takes a ModelSpec and a world size; gives plans that obey every rule (``plan.rules``).  Knows nothing of
torch or of how a plan is run.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Literal

from galvatron.core.model import RECOMPUTES, ModelSpec, UnitName
from galvatron.plan import LayerStrategy, Plan, check_strategy
from galvatron.plan.axes import divisors
from galvatron.plan.plan import SCHEDULES, Schedule
from galvatron.plan.rules import STACKED_SCHEDULES

SEQ_LEN = 16
"""Tokens of a test sequence: divisible by tp 8, longer than the tiny Mistral's window."""

MAX_PP = 4
MAX_MICROBATCHES = 8
MAX_CHUNKS = 3
HOSTED_OF = 4
SAMPLES = {"contrast": 16, "image_classification": 8}
"""How many times as many samples a microbatch has as of texts: a loss of few samples averages no rounding, and of two
pairs gradients all but cancel."""


def random_plans(spec: ModelSpec, world_size: int, count: int, seed: int, seq_len: int | None = None) -> list[Plan]:
    """``count`` different plans for ``world_size`` devices, the same ones for the same ``seed``.

    Pipeline depths (1 to 4, as far as they divide the world) and schedules are dealt in turn, in an order drawn for
    the model and the world, so that few plans cover them all; lengths and number of chunks, microbatches (1 to 8, also
    fewer than stages, but in chunks) and the strategy of the embedding, each layer and the head are drawn; of
    one unit in four moments are in host memory.
    """
    seq_len = seq_len or usual_length(spec)
    rng = random.Random(f"{seed} {spec.name} {world_size}")
    pipelines = _pipelines(spec, world_size)
    rng.shuffle(pipelines)
    deals = itertools.cycle(pipelines)
    hosting = random.Random(f"offload {seed} {spec.name} {world_size}")
    plans: dict[Plan, None] = {}
    while len(plans) < count:
        pp, schedule, most_chunks = next(deals)
        fewest = {"interleaved": 2, "zero_bubble": 1}.get(schedule)
        chunks = rng.randint(fewest, most_chunks) if fewest else 1
        plans[_hosted(hosting, _random_plan(rng, spec, world_size, pp, schedule, chunks, seq_len), spec)] = None
    return list(plans)


def _pipelines(spec: ModelSpec, world_size: int) -> list[tuple[int, Schedule, int]]:
    """(stages, schedule, most chunks a stage) of every depth that the world and the layers allow."""
    found: list[tuple[int, Schedule, int]] = []
    for pp in divisors(world_size):
        most = min(MAX_CHUNKS, spec.num_layers // pp)
        if pp <= MAX_PP and most:
            names = SCHEDULES if spec.stacks == 1 else STACKED_SCHEDULES
            names = names if pp > 1 else names[:1]
            found += [(pp, name, most) for name in names if name != "interleaved" or most > 1]
    return found


def usual_length(spec: ModelSpec) -> int:
    """``SEQ_LEN``, or of images what they are to the model."""
    return spec.max_seq_len if spec.task == "image_classification" else SEQ_LEN


def pure_plans(spec: ModelSpec, world_size: int, seq_len: int | None = None) -> dict[str, Plan]:
    """Plans that use one technique for the whole model, by name, as far as ``spec`` and the world allow.

    Names: dp, the levels of recompute (with data parallelism), zero1, zero2, zero3, tp, ulysses, ring, offload (with
    zero 3), experts (dealt out); hsdp1, hsdp2, hsdp3 (replicas of shards) from 4 devices on; every schedule (up to 4
    uneven stages, interleaved ones of 2 chunks, data parallel within) from 2 on, and chunked_zero_bubble (of 2 chunks).
    """
    world, seq_len = world_size, seq_len or usual_length(spec)
    zeros: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)
    strategies = {
        "dp" if level == "none" else level: LayerStrategy(dp_replicate=world, recompute=level) for level in RECOMPUTES
    }
    if world > 1:
        strategies |= {f"zero{zero}": LayerStrategy(dp_shard=world, zero=zero) for zero in zeros}
        strategies |= {axis: LayerStrategy.model_validate({axis: world}) for axis in ("tp", "ulysses")}
        strategies["ring"] = LayerStrategy(cp=world)
        strategies["offload"] = LayerStrategy(dp_shard=world, zero=3, offload="optimizer")
        strategies["experts"] = LayerStrategy(ep=world, dp_replicate=world)
    if world % 4 == 0:
        half = world // 2
        strategies |= {f"hsdp{zero}": LayerStrategy(dp_shard=half, dp_replicate=2, zero=zero) for zero in zeros}
    plans = {
        name: _uniform_plan(spec, strategy, world, seq_len)
        for name, strategy in strategies.items()
        if all(_legal(strategy, kind.name, spec, world, seq_len) for kind in spec.layers)
    }
    deepest: dict[Schedule, int] = {name: pp for pp, name, _ in _pipelines(spec, world) if pp > 1}
    for schedule, pp in deepest.items():
        stage = LayerStrategy(dp_replicate=world // pp)
        chunks = 2 if schedule == "interleaved" else 1
        plans[schedule] = _uniform_plan(spec, stage, world, seq_len, pp, schedule, chunks)
        if schedule == "interleaved":
            plans["chunked_zero_bubble"] = _uniform_plan(spec, stage, world, seq_len, pp, "zero_bubble", chunks)
    return plans


def _uniform_plan(
    spec: ModelSpec,
    strategy: LayerStrategy,
    world_size: int,
    seq_len: int,
    pp: int = 1,
    schedule: Schedule = "1f1b",
    chunks: int = 1,
) -> Plan:
    cut = strategy.ulysses * strategy.cp
    ends = strategy.model_copy(update={"recompute": "none", "ulysses": cut, "cp": 1, "ep": 1})
    if spec.ends == "whole" and cut > 1:
        ends = LayerStrategy(tp=strategy.tp, dp_replicate=strategy.dp * cut)
    entries = pp * chunks
    plan = Plan(
        model=spec.name,
        world_size=world_size,
        layers_per_stage=(spec.num_layers - entries + 1, *(1,) * (entries - 1)),
        schedule=schedule,
        model_chunks=chunks,
        num_microbatches=1 if spec.task == "contrast" else 2 * pp,
        global_batch_size=2 * world_size * SAMPLES.get(spec.task, 1),
        seq_len=seq_len,
        embedding=ends,
        layers=(strategy,) * spec.num_layers,
        head=ends,
    )
    plan.validate(spec, world_size)
    return plan


def _random_plan(
    rng: random.Random, spec: ModelSpec, world_size: int, pp: int, schedule: Schedule, chunks: int, seq_len: int
) -> Plan:
    stage_size = world_size // pp
    choices = {unit: _strategies(unit, spec, stage_size, seq_len) for unit in spec.units}
    cuts = sorted(rng.sample(range(1, spec.num_layers), pp * chunks - 1))
    embedding = rng.choice(choices["embedding"])
    head = embedding if spec.ends_alike else rng.choice(choices["head"])
    layers = tuple(rng.choice(choices[kind.name]) for kind in spec.kind_of_layers())
    rounds = pp if chunks > 1 else 1
    most = 1 if spec.task == "contrast" else MAX_MICROBATCHES // rounds
    num_microbatches = rounds * rng.randint(1, most)
    micro_batch_size = math.lcm(*(strategy.dp for strategy in (embedding, *layers, head))) * rng.randint(1, 2)
    micro_batch_size *= SAMPLES.get(spec.task, 1)
    plan = Plan(
        model=spec.name,
        world_size=world_size,
        layers_per_stage=tuple(b - a for a, b in itertools.pairwise((0, *cuts, spec.num_layers))),
        schedule=schedule,
        model_chunks=chunks,
        num_microbatches=num_microbatches,
        global_batch_size=micro_batch_size * num_microbatches,
        seq_len=seq_len,
        embedding=embedding,
        layers=layers,
        head=head,
    )
    plan.validate(spec, world_size)
    return plan


def _hosted(rng: random.Random, plan: Plan, spec: ModelSpec) -> Plan:
    """``plan``, with the moments of some units in host memory."""
    units = [
        strategy.model_copy(update={"offload": "none" if rng.randrange(HOSTED_OF) else "optimizer"})
        for strategy in (plan.embedding, *plan.layers, plan.head)
    ]
    ends = {"embedding": units[0], "head": units[0] if spec.ends_alike else units[-1]}
    return plan.model_copy(update={**ends, "layers": tuple(units[1:-1])})


def _strategies(unit: UnitName, spec: ModelSpec, stage_size: int, seq_len: int) -> list[LayerStrategy]:
    """Every legal strategy of ``unit`` in a stage of ``stage_size`` devices."""
    zeros: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)
    found = []
    for tp, recompute in itertools.product(divisors(stage_size), RECOMPUTES):
        for ulysses, cp, ep in itertools.product(divisors(stage_size // tp), repeat=3):
            if stage_size % (tp * ulysses * cp):
                continue
            inner = {"tp": tp, "ulysses": ulysses, "cp": cp, "ep": ep, "recompute": recompute}
            dp = stage_size // (tp * ulysses * cp)
            found.append(LayerStrategy.model_validate({**inner, "dp_replicate": dp}))
            found += [
                LayerStrategy.model_validate({**inner, "dp_shard": n, "dp_replicate": dp // n, "zero": zero})
                for n, zero in itertools.product(divisors(dp), zeros)
                if n * ulysses * cp > 1
            ]
    return [strategy for strategy in found if _legal(strategy, unit, spec, stage_size, seq_len)]


def _legal(strategy: LayerStrategy, unit: UnitName, spec: ModelSpec, stage_size: int, seq_len: int) -> bool:
    # a microbatch of stage_size sequences divides by every dp degree, so it forbids nothing here
    return check_strategy(strategy, unit, spec, stage_size, stage_size, seq_len) is None
