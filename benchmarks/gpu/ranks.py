"""Part ``ranks``: what rank 0 of larger plans really takes, on PyTorch's fake process group.

The rank is real, with its parameters, its microbatches and its update; the others are not: what they would send is
whatever is in memory, so that nothing but bytes can be read from it.  Activations are counted as in every profile;
links and times are estimated, for they play no part in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from galvatron.core.model import ENDS, RECOMPUTES, ModelSpec, Precision, Recompute
from galvatron.core.model_profile import ActivationSample, ModelProfile
from galvatron.cost import predict
from galvatron.estimate import cluster
from galvatron.models import build_spec
from galvatron.parallelize import World
from galvatron.parallelize.sharding.fsdp import DTYPES
from galvatron.plan import LayerStrategy, Plan
from galvatron.profile.activations import count_activations
from galvatron.profile.device_memory import cublas_bytes
from galvatron.profile.units import UnitShape

from .children import Child, Clock, Row, reason_of
from .runs import peak_from_now, started, train
from .sizes import Device, Work, config_of

S = LayerStrategy
Counted = dict[tuple[str, int, Recompute], ActivationSample]


def run(device: Device, clock: Clock) -> Iterator[Row]:
    with Child(measure, device, clock, start=device.start) as child:
        yield from child.rows(clock)


def plans(work: Work, num_layers: int, precision: Precision) -> Iterator[tuple[str, Plan]]:
    """Sharded, cut, mixed and pipelined, on 8 and on 64 devices; a CPU tries the first of either."""
    zero3, tp = S(dp_shard=8, zero=3, recompute="selective"), S(tp=8)
    mixed = (S(tp=2, dp_shard=4, zero=3, recompute="selective"), S(tp=4, dp_shard=2, zero=1))
    halves = (mixed[0],) * (num_layers // 2) + (mixed[1],) * (num_layers - num_layers // 2)
    yield "ZeRO 3", _plan(work, precision, 8, (num_layers,), zero3, (zero3,) * num_layers)
    yield "tensor parallel", _plan(work, precision, 8, (num_layers,), tp, (tp,) * num_layers)
    yield "mixed", _plan(work, precision, 8, (num_layers,), mixed[0], halves)
    inner = S(tp=4, dp_shard=4, zero=2, recompute="full")
    yield "4 stages", _plan(work, precision, 64, (num_layers // 4,) * 4, inner, (inner,) * num_layers)
    hybrid = S(dp_shard=8, dp_replicate=8, zero=3, recompute="selective")
    yield "hybrid ZeRO 3", _plan(work, precision, 64, (num_layers,), hybrid, (hybrid,) * num_layers)


def _plan(
    work: Work, precision: Precision, world_size: int, stages: tuple[int, ...], ends: S, layers: tuple[S, ...]
) -> Plan:
    """4 microbatches of at least a sequence a data-parallel rank."""
    ends, dp = ends.model_copy(update={"recompute": "none"}), max(s.dp for s in (ends, *layers))
    return Plan(
        model=work.model,
        world_size=world_size,
        layers_per_stage=stages,
        num_microbatches=4,
        global_batch_size=4 * dp * work.micro_batch_size,
        seq_len=work.seq_len,
        precision=precision,
        embedding=ends,
        layers=layers,
        head=ends,
    )


def measure(connection: Connection, device: Device, clock: Clock) -> None:
    work = Work("13B", 1, 4096, 1) if device.is_gpu else Work("tiny", 1, 64, 1)
    if not device.is_gpu:
        torch.set_num_threads(1)
    precision: Precision = "bf16"
    config = config_of(work.model)
    spec, counted = build_spec(config), Counted()
    for name, plan in list(plans(work, spec.num_layers, precision))[:: 1 if device.is_gpu else 3]:
        about = {"plan": name, "devices": plan.world_size}
        if clock.left_s <= 0:
            connection.send({**about, "skipped": "no time left"})
            continue
        prediction = predict(plan, _profile(plan, spec, work, counted), cluster(f"h100:{plan.world_size}"))
        first = prediction.stages[0]
        predicted = first.peak_memory_bytes - first.runtime_bytes
        try:
            measured = _peak_bytes(plan, device)
        except torch.OutOfMemoryError as error:
            connection.send({**about, "skipped": reason_of(error), "predicted_tensor_bytes": predicted})
            continue
        error = predicted / measured - 1
        connection.send({**about, "predicted_tensor_bytes": predicted, "tensor_bytes": measured, "tensor_error": error})


def _profile(plan: Plan, spec: ModelSpec, work: Work, counted: Counted) -> ModelProfile:
    """Activations counted for what the plan uses, once for all plans; times that say nothing."""
    config, dtype = config_of(work.model), DTYPES[plan.precision]
    named = [("embedding", plan.embedding), *(("layer", layer) for layer in plan.layers), ("head", plan.head)]
    cases = sorted({(unit, strategy.tp, strategy.recompute) for unit, strategy in named})
    cases += [(unit, 1, "none") for unit in ENDS if (unit, 1, "none") not in cases]
    shapes = {(unit, tp): UnitShape(config, spec, unit, tp, work.seq_len, dtype) for unit, tp, _ in cases}
    for unit, tp, mode in cases:
        if (unit, tp, mode) not in counted:
            counted[unit, tp, mode] = count_activations(shapes[unit, tp], mode)
    seconds = {"forward_s": 1e-3, "backward_s": 2e-3, "again_s": dict.fromkeys(RECOMPUTES[1:], 1e-3)}
    timed = [{"unit": unit, "tp": tp, "batch": 1, "seq_len": work.seq_len, **seconds} for unit, tp in shapes]
    return ModelProfile.model_validate(
        {
            "spec": spec,
            "device": "any",
            "precision": plan.precision,
            "seq_len": work.seq_len,
            "compute": timed,
            "activations": [counted[case] for case in cases],
        }
    )


def _peak_bytes(plan: Plan, device: Device) -> int:
    """The most that tensors of rank 0 take in a step."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=plan.world_size)
    try:
        place = torch.device("cuda", 0) if device.is_gpu else torch.device("cpu")
        if device.is_gpu:
            torch.cuda.set_device(place)
        world = World(0, plan.world_size, 0, place, "nccl" if device.is_gpu else "gloo")
        model, optimizer = started(plan, world, compiled=False)
        memory = peak_from_now(place)
        ids = torch.zeros(plan.global_batch_size, plan.seq_len, dtype=torch.int64)
        with memory.watch(model, optimizer, [ids]):
            train(model, optimizer, ({"input_ids": ids}, ids))
        return memory.bytes() - (cublas_bytes(place) if device.is_gpu else 0)
    finally:
        dist.destroy_process_group()
