"""Predicted bytes against those that the runtime allocates, rank by rank, on real steps.

The fullest rank of every stage is stage rank 0.  Parameters, gradients and AdamW states are compared exactly;
activations at the first backward of a step, when all microbatches in flight are there.
"""

from __future__ import annotations

import functools
import gc
import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tests.unit.profiles import make_hardware
from transformers import PretrainedConfig

from galvatron.core.job import TrainSection
from galvatron.core.model import ENDS, RECOMPUTES
from galvatron.core.model_profile import ActivationSample, ModelProfile
from galvatron.core.tasks import TOKEN_TASKS
from galvatron.cost import predict, replay
from galvatron.cost.stages import Stage
from galvatron.models import build_spec, for_task, freeze_parameters, random_inputs
from galvatron.parallelize import ParallelModel, init_world, parallelize
from galvatron.parallelize.sharding.fsdp import DTYPES
from galvatron.plan import LayerStrategy, Plan
from galvatron.plan.schedules import actions
from galvatron.profile.activations import count_activations
from galvatron.profile.storages import StorageLog, storage_bytes
from galvatron.profile.units import UnitShape
from galvatron.testing.memory import settled_bytes
from galvatron.testing.models import tiny_config, tiny_model
from galvatron.testing.pool import Pool
from galvatron.train.memory import PeakMemory
from galvatron.train.offload import host_tensors
from galvatron.train.optimizer import build_optimizer

SEQ_LEN, BATCH = 32, 8
LAYERS = {"gpt2": "n_layer"}
FIXED: dict[str, dict[str, Any]] = {
    "t5": {},
    "bart": {},
    "whisper": {},
    "clip": {},
    "llava": {"vision_feature_layer": -1},
    "swin": {},
    "mixtral": {"num_experts_per_tok": 4},
}
"""Families of as many layers as the tiny ones have: of several stacks (LLaVA's tower is used to its last layer), and of
experts who all see every token, so that bytes do not depend on values."""
S = LayerStrategy
ALONE, TP2, TP4 = S(), S(tp=2), S(tp=4)
ZERO3, ZERO2, ZERO1, DP4 = S(dp_shard=4, zero=3), S(dp_shard=4, zero=2), S(dp_shard=4, zero=1), S(dp_replicate=4)
MIXED2 = S(tp=2, dp_shard=2, zero=3)
TP2X2 = S(tp=2, dp_replicate=2)
ZERO2_3 = S(dp_shard=2, zero=3)
HYBRID = S(dp_shard=2, dp_replicate=2, zero=2)
DP2, DEALT = S(dp_replicate=2), S(ep=2, dp_replicate=2)


def plan(layers: Iterable[LayerStrategy], ends: LayerStrategy, **changes: object) -> Plan:
    layers = tuple(layers)
    fields = {
        "model": "tiny",
        "world_size": 4,
        "layers_per_stage": (len(layers),),
        "num_microbatches": 2,
        "global_batch_size": BATCH,
        "seq_len": SEQ_LEN,
        "embedding": ends,
        "head": ends,
        "layers": layers,
    }
    return Plan.model_validate({**fields, **changes})


FULL, HOST = {"recompute": "full"}, {"offload": "optimizer"}
DP4_HOST = DP4.model_copy(update=HOST)
BETWEEN = ("selective", "mlp", "linears", "mlp")
FROZEN: dict[str, tuple[str, ...]] = {
    "frozen from below": ("model.embed_tokens.*", "model.layers.[01].*"),
    "a frozen first stage": ("model.embed_tokens.*", "model.layers.[01].*"),
    "frozen between": ("transformer.h.[12].*", "*.ln_1.*"),
}
CAPACITY = {"full experts": 0.5}
SLOW = ("a stage where stacks meet", "sharded stages of stacks", "sounds to texts in stages", "experts")
PLANS: dict[str, tuple[str, Plan]] = {
    "dp": ("llama", plan([DP4] * 4, DP4)),
    "zero 1": ("gpt2", plan([ZERO1] * 4, ZERO1)),
    "zero 2, one microbatch": ("llama", plan([ZERO2] * 4, ZERO2, num_microbatches=1)),
    "zero 3, tied": ("qwen2", plan([ZERO3] * 4, ZERO3)),
    "tp": ("llama", plan([TP4] * 4, TP4)),
    "tp, fused qkv": ("gpt2", plan([TP4, TP4, MIXED2, MIXED2], MIXED2)),
    "mixed": ("llama", plan([ZERO3, TP4, HYBRID, MIXED2.model_copy(update=FULL)], MIXED2)),
    "bf16": ("llama", plan([ZERO1, ZERO2, ZERO3, DP4], ZERO3, precision="bf16", grad_reduce_dtype="fp32")),
    "ulysses": ("llama", plan([S(ulysses=4)] * 4, S(ulysses=4))),
    "ring": ("llama", plan([S(cp=4, zero=3)] * 4, S(ulysses=4, zero=3))),
    "ulysses and rings": (
        "llama",
        plan(
            [S(ulysses=2, cp=2), S(tp=2, cp=2), S(ulysses=4, recompute="selective"), S(cp=2, dp_shard=2, zero=2)], TP4
        ),
    ),
    "1f1b": ("llama", plan([TP2, S(dp_replicate=2), TP2, TP2], TP2, layers_per_stage=(1, 3), num_microbatches=4)),
    "gpipe, four stages, tied": (
        "qwen2",
        plan([ALONE] * 4, ALONE, layers_per_stage=(1, 1, 1, 1), num_microbatches=4, schedule="gpipe"),
    ),
    "interleaved, uneven": (
        "llama",
        plan(
            [TP2, S(dp_replicate=2), ZERO2_3, ZERO2_3.model_copy(update=FULL), TP2, TP2],
            TP2,
            layers_per_stage=(2, 1, 1, 2),
            schedule="interleaved",
            model_chunks=2,
            num_microbatches=4,
        ),
    ),
    "interleaved, four stages, tied": (
        "qwen2",
        plan([ALONE] * 8, ALONE, layers_per_stage=(1,) * 8, schedule="interleaved", model_chunks=2, num_microbatches=8),
    ),
    "zero bubble": (
        "llama",
        plan(
            [TP2, S(dp_replicate=2), ZERO2_3, TP2.model_copy(update=FULL)],
            TP2,
            layers_per_stage=(2, 2),
            schedule="zero_bubble",
            num_microbatches=4,
        ),
    ),
    "zero bubble, four stages, recomputed": (
        "llama",
        plan(
            [ALONE, *[S(recompute="full")] * 3],
            ALONE,
            layers_per_stage=(1,) * 4,
            schedule="zero_bubble",
            num_microbatches=8,
        ),
    ),
    "zero bubble in chunks": (
        "llama",
        plan([ALONE] * 8, ALONE, layers_per_stage=(1,) * 8, schedule="zero_bubble", model_chunks=2, num_microbatches=8),
    ),
    "moments in host memory": (
        "qwen2",
        plan([*(s.model_copy(update=HOST) for s in (ZERO3, DP4, MIXED2)), TP4], DP4_HOST),
    ),
    "frozen from below": ("llama", plan([ZERO3, ZERO2, ZERO1, TP4], MIXED2)),
    "a frozen first stage": ("llama", plan([S(dp_replicate=2), TP2] * 2, TP2, layers_per_stage=(2, 2))),
    "frozen between": ("gpt2", plan([ZERO3, ZERO3.model_copy(update=FULL), DP4, ZERO3], ZERO3)),
    "masked words, tied": ("bert", plan([TP4, ZERO3, S(ulysses=2, tp=2), MIXED2], MIXED2)),
    "masked words in stages": (
        "bert",
        plan([TP2, S(dp_replicate=2), TP2, TP2], TP2, layers_per_stage=(1, 3), num_microbatches=4),
    ),
    "images": ("vit", plan([ZERO3, TP2X2, HYBRID, TP2X2.model_copy(update=FULL)], TP2X2, seq_len=17)),
    "images in stages": (
        "vit",
        plan([S(dp_replicate=2), TP2, ZERO2_3, TP2], TP2, layers_per_stage=(2, 2), num_microbatches=4, seq_len=17),
    ),
    "classes of texts": ("bert classifier", plan([ZERO3, TP4, TP4, DP4], DP4, precision="bf16")),
    "classes of texts by a decoder": ("llama classifier", plan([TP4, ZERO3, MIXED2, S(cp=2, tp=2)], TP4)),
    "texts to texts in stages": (
        "t5",
        plan([ALONE] * 4, ALONE, world_size=2, layers_per_stage=(3, 1), num_microbatches=4),
    ),
    "a stage where stacks meet": (
        "bart",
        plan([ALONE] * 4, ALONE, world_size=2, layers_per_stage=(1, 3), num_microbatches=4),
    ),
    "sharded stages of stacks": (
        "t5",
        plan([ZERO2_3, TP2, ZERO2_3, TP2], ZERO2_3, layers_per_stage=(3, 1), num_microbatches=4),
    ),
    "sounds to texts in stages": (
        "whisper",
        plan([ALONE] * 4, ALONE, world_size=2, layers_per_stage=(2, 2), num_microbatches=4),
    ),
    "pairs in stages": (
        "clip",
        plan([ALONE] * 5, ALONE, world_size=2, layers_per_stage=(2, 3), num_microbatches=1, seq_len=16),
    ),
    "experts": ("mixtral", plan([DP2, TP2, DEALT, DEALT.model_copy(update=FULL)], DP2, world_size=2)),
    "full experts": ("mixtral", plan([DP2, TP2, DEALT, DEALT.model_copy(update=FULL)], DP2, world_size=2)),
    "recompute": ("llama", plan([ZERO3.model_copy(update=FULL)] * 3 + [TP4.model_copy(update=FULL)], TP4)),
    "levels between": (
        "gpt2",
        plan(
            [s.model_copy(update={"recompute": r}) for s, r in zip((ZERO3, TP4, TP4, MIXED2), BETWEEN, strict=True)],
            MIXED2,
        ),
    ),
}


@dataclass(frozen=True)
class Bytes:
    parameters: int
    gradients: int
    optimizer: int
    activations: int | None
    peak: int


def config_of(family: str, num_layers: int) -> PretrainedConfig:
    if family in FIXED:
        return tiny_config(family, **FIXED[family])
    base = family.removesuffix(" classifier")
    config = tiny_config(base, **{LAYERS.get(base, "num_hidden_layers"): num_layers}, pad_token_id=1)
    return config if base == family else for_task(config, "text_classification")


@functools.cache
def counted(family: str, num_layers: int, freeze: tuple[str, ...], unit: str, *shape: Any) -> ActivationSample:
    """Activations of one unit at (tp, recompute, sequence length, precision)."""
    config, (tp, recompute, seq_len, precision) = config_of(family, num_layers), shape
    spec = build_spec(config, freeze=freeze)
    return count_activations(UnitShape(config, spec, unit, tp, seq_len, DTYPES[precision]), recompute)


def profile_of(family: str, plan: Plan, freeze: tuple[str, ...]) -> ModelProfile:
    """Counted activations of what ``plan`` has, made-up times."""
    spec = build_spec(config_of(family, len(plan.layers)), freeze=freeze)
    kinds = [kind.name for kind in spec.kind_of_layers()]
    needed = {(unit, s.tp, s.recompute) for unit, s in zip(kinds, plan.layers, strict=True)}
    tps = {plan.embedding.tp, plan.head.tp, *(s.tp for s in plan.layers)}
    needed |= {(unit, tp, "none") for unit in ENDS for tp in tps} | {(kind, min(tps), "none") for kind in kinds}
    samples = [
        counted(family, len(plan.layers), freeze, unit, tp, level, plan.seq_len, plan.precision)
        for unit, tp, level in sorted(needed)
    ]
    compute = [
        {
            "unit": unit,
            "tp": tp,
            "batch": 1,
            "seq_len": plan.seq_len,
            "forward_s": 1e-3,
            "backward_s": 2e-3,
            "again_s": dict.fromkeys(RECOMPUTES[1:], 1e-3),
        }
        for unit in spec.units
        for tp in sorted(tps)
    ]
    return ModelProfile.model_validate(
        {
            "spec": spec,
            "device": "cpu",
            "precision": plan.precision,
            "seq_len": plan.seq_len,
            "compute": compute,
            "activations": samples,
        }
    )


def batch_of(model: ParallelModel) -> dict[str, torch.Tensor]:
    """Inputs and labels of a step."""
    generator, task, seq_len = torch.Generator().manual_seed(0), model.spec.task, model.plan.seq_len
    inputs = random_inputs(model.config, task, BATCH, seq_len, generator)
    if task == "contrast":
        return inputs
    shape = (BATCH, seq_len) if task in TOKEN_TASKS else (BATCH,)
    return {**inputs, "labels": torch.randint(model.spec.vocab_size, shape, generator=generator)}


def measure(family: str, plan: Plan, freeze: tuple[str, ...], capacity_factor: float | None = None) -> Bytes:
    memory = PeakMemory(torch.device("cpu"))
    whole = tiny_model(config_of(family, len(plan.layers)))
    freeze_parameters(whole, freeze)
    model = parallelize(whole, plan, world=init_world("cpu"), capacity_factor=capacity_factor)
    del whole
    section = TrainSection(global_batch_size=BATCH, seq_len=plan.seq_len, num_steps=2)
    optimizer = build_optimizer(model.local_parameters, section)
    batch = batch_of(model)
    with memory.watch(model, optimizer, list(batch.values())):
        model.train_step(**batch)
        optimizer.step()
    gc.collect()  # what a cycle of the first step still holds is not the second step's
    activations = activations_at_first_backward(model, batch)
    optimizer.step()
    hosted = set(map(id, host_tensors(optimizer)))
    states = [(name, value) for state in optimizer.state.values() for name, value in state.items()]
    moments = [value for name, value in states if name != "step" and id(value) not in hosted]
    tensors = [parameter.tensor for parameter in model.local_parameters]
    return Bytes(
        storage_bytes(tensors), storage_bytes(t.grad for t in tensors if t.grad is not None), storage_bytes(moments),
        activations, memory.bytes(),
    )  # fmt: skip


def activations_at_first_backward(model: ParallelModel, batch: dict[str, torch.Tensor]) -> int | None:
    """Bytes born in a step and alive when its first backward begins, gathered parameters left out; None without one."""
    seen: list[int] = []
    with StorageLog() as log:
        driver = model._driver
        original = driver._before_backward

        def before_backward(*args: Any) -> None:
            if not seen:
                buffers = [buffer for stage in model.stages for buffer in stage.buffers()]
                known = [*buffers, *(p.tensor for p in model.local_parameters), *batch.values()]
                log.ignore([*model.gathered_buffers(), *model.stages[-1].early_gradient.tensors(), *known])
                seen.append(settled_bytes(log))
            original(*args)

        driver._before_backward = before_backward  # type: ignore[method-assign]
        model.train_step(**batch)
    return seen[0] if seen else None


def held_at_first_backward(plan: Plan, stage: Stage, index: int) -> int:
    """Predicted activations of the microbatches that chunks have taken in by then."""
    order = actions(plan.schedule, plan.pp, index, plan.num_microbatches, plan.model_chunks)
    before = itertools.takewhile(lambda action: action.kind == "forward", order)
    alive = Counter(action.chunk for action in before)
    microbatch = [sum(int(unit.activation_bytes) for unit in c.memories) + c.beside_bytes for c in stage.chunks]
    return sum(alive[chunk] * held for chunk, held in enumerate(microbatch))


def least_peaks(run: Callable[[], list[Bytes]], bounds: list[int], tries: int = 5) -> list[Bytes]:
    """Every rank's bytes, its peak the least of as many tries as it takes to come below its bound.

    Gloo's threads hold a collective's tensors for a moment after it is over, on a busy machine beyond their
    successors' birth, so that one step in forty counts some twice.  What the runtime holds itself is held in every try.
    """
    least = run()
    for _ in range(tries - 1):
        if all(rank.peak <= bound for rank, bound in zip(least, bounds, strict=True)):
            break
        least = [replace(a, peak=min(a.peak, b.peak)) for a, b in zip(least, run(), strict=True)]
    return least


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in PLANS])
def test_predicted_bytes_are_those_allocated(pool: Pool, name: str) -> None:
    (family, plan), freeze, factor = PLANS[name], FROZEN.get(name, ()), CAPACITY.get(name)
    profile = profile_of(family, plan, freeze).with_capacity(factor)
    hardware = make_hardware(plan.world_size, host_bytes_per_s=4e9)
    prediction, stages = predict(plan, profile, hardware), replay(plan, profile, hardware).stages
    held = [held_at_first_backward(plan, stage, index) for index, stage in enumerate(stages)]
    run = functools.partial(pool.run, measure, family, plan, freeze, factor, world_size=plan.world_size)
    measured = least_peaks(run, [s.peak_memory_bytes for s in prediction.stages for _ in range(plan.stage_size)])
    for stage, predicted in enumerate(prediction.stages):
        fullest = measured[stage * plan.stage_size]
        assert fullest.parameters == predicted.parameter_bytes
        assert fullest.gradients == predicted.gradient_bytes
        assert fullest.optimizer == predicted.optimizer_bytes
        assert predicted.low_memory_bytes <= fullest.peak <= predicted.peak_memory_bytes
        if fullest.activations is not None:
            # the first trained layer needs no gradient of its input, so it keeps less than the others of its kind
            keeps_less = 0.03 if not profile.spec.trains_before(0) else 0.0
            assert held[stage] * (0.98 - keeps_less) <= fullest.activations <= held[stage] * 1.02
            assert held[stage] <= predicted.activation_bytes
