"""Search equals brute force: every plan of a small random space is enumerated from the definitions."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from galvatron.core.errors import InfeasibleError
from galvatron.core.hardware import HardwareProfile
from galvatron.core.model import OFFLOADS, RECOMPUTES, Joint, ModelSpec, ParameterSpec, UnitSpec
from galvatron.core.model_profile import ModelProfile
from galvatron.estimate import spec_of_config
from galvatron.search import Limits, search
from unit.profiles import make_hardware, make_model, make_spec
from unit.search.enumerate_plans import Choice, every_task, plans_of, size_of

SHAPES = [  # world size, layers, layers with experts, global batches
    (2, 3, 0, (2,)),
    (2, 4, 0, (4,)),
    (2, 2, 2, (2, 4)),
    (4, 2, 0, (4,)),
    (4, 3, 0, (2,)),
    (4, 1, 2, (4,)),
    (4, 4, 0, (8,)),
    (3, 3, 0, (3, 6)),
    (6, 2, 1, (6,)),
    (8, 2, 0, (8,)),
]
SWITCHED = ("tp", "ulysses", "cp", "ep", "zero", "dp_shard", "selective", "full")
BETWEEN = ("mlp", "linears")  # one of them where the seed is odd
OFFLOAD = ("offload",)  # in every third ten of seeds
STACKED = [2, 5, 8]  # of the shapes, those of two kinds of layers
FAST, INSTANCES = 60, 600
TWO_STACKS = [INSTANCES + 10 * n + STACKED[n % 3] for n in range(60)]
FEW = TWO_STACKS[:9]
TELLING = {142}  # interleaving two kinds of layers fits where 1F1B does not
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 1}
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "clip": {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": 16,
        "vision_config": {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, **_TOWER},
        "text_config": {"model_type": "clip_text_model", "vocab_size": 97, "max_position_embeddings": 16, **_TOWER},
    },
    "t5": {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 97, **_T5},
}
MOST = 200_000  # combinations of strategies that a task of an instance may have


def of_two_stacks(spec: ModelSpec, *, table: bool) -> ModelSpec:
    """Layers of the second kind as another stack: a matrix joins them to the first, and a table of scores is shared."""
    first, second = spec.layers
    between = ParameterSpec(name="between", shape=(first.hidden_size, 300))
    scores = ParameterSpec(name="scores", shape=(8, 40), shared=True)
    return spec.model_copy(
        update={
            "stacks": 2,
            "joints": (Joint(layer=first.count, parameters=("between",), table=table),),
            "layers": (first.model_copy(update={"parameters": (*first.parameters, scores)}), second),
            "embedding": UnitSpec(parameters=(*spec.embedding.parameters, between)),
        }
    )


def instance(seed: int) -> tuple[ModelProfile, HardwareProfile, tuple[int, ...], Choice, Limits, random.Random]:
    """A made-up model and cluster, and a random part of the space that is small enough to enumerate."""
    shake = random.Random(seed)
    world, layers, others, batches = SHAPES[seed % len(SHAPES)]
    tied = shake.random() < 0.4
    spec = make_spec(layers, vocab=shake.choice([30, 250, 1000]), tied=tied, others=others)
    if seed >= INSTANCES:
        spec = of_two_stacks(spec, table=shake.random() < 0.5)
    rate, optimizer = 10 ** shake.uniform(9, 11), 10 ** shake.uniform(-9, -7)
    tps = tuple(d for d in (1, 2, 4) if world % d == 0)
    model = make_model(spec, tps=tps, seed=seed, flops_per_s=rate, optimizer_s_per_parameter=optimizer)
    device = shake.choice(["cpu", "cuda"])
    latency_s, rate = 10 ** shake.uniform(-6, -3), 4e9 if seed // 10 % 3 == 1 else None
    hardware = make_hardware(world, device, latency_s=latency_s, seed=seed, memory_bytes=2**40, host_bytes_per_s=rate)
    if device == "cpu":  # ranks that share cores
        slow = hardware.device.model_copy(update={"full_speed_fraction": (1.0, 0.5, 0.3)[seed // 2 % 3]})
        hardware = hardware.model_copy(update={"device": slow})
    schedules = shake.sample([("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1)], shake.choice([1, 3]))
    on = shake.sample(SWITCHED, shake.choice([3, 4, 5])) + [BETWEEN[seed // 2 % 2]] * (seed % 2)
    on += [*OFFLOAD] * (seed // 10 % 3 == 1)
    while not 0 < size_of(model, hardware, batches, choice_of(on, schedules)) <= MOST:
        on, schedules = on[1:], [*schedules, ("1f1b", 1)] if ("1f1b", 1) not in schedules else schedules
    return model, hardware, batches, choice_of(on, schedules), limits_of(on, schedules), shake


def choice_of(on: list[str], schedules: list[tuple[str, int]]) -> Choice:
    degrees = tuple(range(1, 9))
    values: dict[str, tuple[Any, ...]] = {
        name: degrees if name in on else (1,) for name in ("tp", "ulysses", "cp", "ep", "dp_shard")
    }
    values["zero"] = (0, 1, 2, 3) if "zero" in on else (0,)
    values["recompute"] = ("none", *(level for level in RECOMPUTES[1:] if level in on))
    values["offload"] = OFFLOADS if "offload" in on else OFFLOADS[:1]
    if ("zero_bubble", 1) in schedules and ("interleaved", 2) not in schedules:
        schedules = [*schedules, ("zero_bubble", 2)]  # which is searched where interleaving is not
    return Choice(values, tuple(schedules))


def limits_of(on: list[str], schedules: list[tuple[str, int]]) -> Limits:
    used = {schedule for schedule, _ in schedules}
    forbidden = {name for name in (*SWITCHED, *BETWEEN, *OFFLOAD) if name not in on}
    forbidden |= {"1f1b", "gpipe", "interleaved", "zero_bubble"} - used
    return Limits("all", forbid=frozenset(forbidden), at_most={"model_chunks": 2})


@pytest.mark.parametrize(
    "seed",
    [pytest.param(s, marks=[] if s < FAST or s in TELLING else [pytest.mark.slow]) for s in range(INSTANCES)]
    + [pytest.param(s, marks=[] if s in FEW else [pytest.mark.slow]) for s in TWO_STACKS],
)
def test_the_search_equals_brute_force(seed: int) -> None:
    check(*instance(seed))


@pytest.mark.parametrize(("name", "seed"), [("clip", 0), ("t5", 0), ("t5", 1)])
def test_the_search_equals_brute_force_on_shipped_data(name: str, seed: int) -> None:
    """Two stacks as families describe them, with what rides along and what joins them, on two devices."""
    shake, on, schedules = random.Random(seed), ["tp", "zero", "dp_shard", "full"], [("1f1b", 1)]
    spec = spec_of_config(CONFIGS[name], name)
    model = make_model(spec, 16, tps=(1, 2), seed=seed, flops_per_s=1e9)
    hardware = make_hardware(2, latency_s=10 ** shake.uniform(-6, -3), seed=seed, memory_bytes=2**40)
    check(model, hardware, (2, 4), choice_of(on, schedules), limits_of(on, schedules), shake)


def check(
    model: ModelProfile,
    hardware: HardwareProfile,
    batches: tuple[int, ...],
    choice: Choice,
    limits: Limits,
    shake: random.Random,
) -> None:
    """The search finds the best of all plans, within a limit of memory that ``shake`` draws."""
    found = [
        (objectives / batch, peaks)
        for batch in batches
        for setting in every_task(model, hardware, batch, choice)
        for objectives, peaks in plans_of(setting, choice)
    ]
    objectives, peaks = (np.concatenate(columns) for columns in zip(*found, strict=True))
    limit = random_limit(shake, np.unique(peaks), hardware.device.type)
    fitting = objectives[peaks <= room_of(limit, hardware.device.type)]
    arguments: dict[str, Any] = {
        "global_batch_size": batches,
        "memory_limit_bytes": limit,
        "limits": limits,
        "num_candidates": shake.choice([1, 8]),  # with one, every task but the best may be ruled out by its bound
    }
    if not len(fitting):
        with pytest.raises(InfeasibleError):
            search(model, hardware, **arguments)
        return
    result = search(model, hardware, baselines=shake.random() < 0.3, **arguments)
    proof, optimum = result.prediction.proof, float(fitting.min()) * result.plan.global_batch_size
    assert proof is not None
    assert proof.objective_s == pytest.approx(optimum, rel=1e-9)
    assert proof.lower_bound_s <= optimum * (1 + 1e-9)
    assert proof.gap == pytest.approx(0.0, abs=1e-9)
    assert all(stage.peak_memory_bytes <= limit for stage in result.prediction.stages)
    result.plan.validate(model.spec, hardware.world_size)


def random_limit(shake: random.Random, ordered: Any, device: str) -> int:
    """Too little for any plan, just enough for some (mostly), or plenty."""
    kind = shake.random()
    at = -1 if kind >= 0.9 else int(shake.random() ** 2 * (len(ordered) - 1))
    tensors = int(ordered[0]) - 1 if kind < 0.1 else int(ordered[at])
    return tensors if device == "cpu" else int(tensors * 1.03) + 2 + 2**30


def room_of(limit: int, device: str) -> int:
    """A process on CUDA takes 1 GiB and 3% of its tensors besides them."""
    return limit if device == "cpu" else int((limit - 2**30) / 1.03)
