"""What waits in a pipeline whose sums of gradients and gathers of parameters are slow?

    python benchmarks/slow_reductions.py --out slow_reductions.json

Trains a tiny LLaMA on gloo processes, four stages of two replicas or shards, where every sum and every gather of more
than a kilobyte takes ``--seconds`` longer, one after the other as on one link, and messages between stages take none.
All else takes milliseconds, so that a step's seconds over those of one collective are the collectives that it waits
for.  Held against the replay of the same plan on a profile where these collectives alone take time.  Writes JSON: by
ZeRO stage, how many a step waits for, traced and replayed; and what each rank waited for before each gradient message.
"""

from __future__ import annotations

import time
from typing import Any

import measure
import torch
import torch.distributed as dist

from galvatron.core.hardware import Device, HardwareProfile, Link, Overlap
from galvatron.core.model_profile import ComputeSample, ModelProfile
from galvatron.cost import replay
from galvatron.estimate import estimate_model
from galvatron.models import build_spec
from galvatron.parallelize import init_world, parallelize
from galvatron.plan import LayerStrategy, Plan
from galvatron.plan.groups import group_shapes, p2p_strides
from galvatron.testing import Pool
from galvatron.testing.models import tiny_config, tiny_model
from galvatron.testing.slow import SlowCollectives, before_messages

LAYERS, SEQ_LEN, ROWS, DP = 8, 16, 4, 2


def plan_for(zero: int, pp: int, microbatches: int) -> Plan:
    strategy = LayerStrategy(dp_shard=DP, zero=zero) if zero else LayerStrategy(dp_replicate=DP)
    return Plan(
        model="tiny",
        world_size=DP * pp,
        layers_per_stage=(LAYERS // pp,) * pp,
        num_microbatches=microbatches,
        global_batch_size=ROWS * microbatches,
        seq_len=SEQ_LEN,
        embedding=strategy,
        layers=(strategy,) * LAYERS,
        head=strategy,
    )


def traced(plan: Plan, seconds: float, steps: int) -> tuple[list[float], list[str]]:
    """This rank's seconds of every step after a first, and the events of the last."""
    world = init_world("cpu")
    torch.set_num_threads(1)
    model = parallelize(tiny_model("llama", num_hidden_layers=LAYERS), plan, world=world)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.spec.vocab_size, (plan.global_batch_size, SEQ_LEN + 1), generator=generator)
    float(model.train_step(tokens[:, :-1], tokens[:, 1:]))
    found = []
    for _ in range(steps):
        dist.barrier()
        with SlowCollectives(seconds) as slow:
            start = time.perf_counter()
            float(model.train_step(tokens[:, :-1], tokens[:, 1:]))
            found.append(time.perf_counter() - start)
    return found, slow.events


def profiles(world_size: int) -> tuple[ModelProfile, HardwareProfile]:
    """Of a machine where a sum or a gather takes one second and all else none."""
    device = Device(name="waiting", type="cpu", memory_bytes=2**40, matmul_flops_per_s={"fp32": 1e12})
    spec = build_spec(tiny_config("llama", num_hidden_layers=LAYERS))
    model = estimate_model(spec, device, seq_len=SEQ_LEN, precision="fp32", tp_degrees=[1])
    free = tuple(
        ComputeSample(unit=s.unit, tp=s.tp, batch=s.batch, seq_len=s.seq_len, forward_s=0.0, backward_s=0.0)
        for s in model.compute
    )
    links = [
        Link(op=op, size=size, stride=stride, latency_s=1.0, seconds_per_byte=0.0)
        for size, stride in group_shapes(world_size)
        for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    ]
    links += [Link(op="p2p", size=2, stride=n, latency_s=0.0, seconds_per_byte=0.0) for n in p2p_strides(world_size)]
    hardware = HardwareProfile(
        device=device,
        world_size=world_size,
        devices_per_node=world_size,
        backend="gloo",
        links=tuple(links),
        overlap=Overlap(compute_slowdown=1.0, communication_slowdown=1.0),
    )
    return model.model_copy(update={"compute": free, "optimizer_s_per_parameter": 0.0}), hardware


def replayed(plan: Plan) -> float:
    """How many collectives the replayed step waits for."""
    return replay(plan, *profiles(plan.world_size)).step_time_s


def point(pool: Pool, zero: int, options: Any) -> dict[str, Any]:
    plan, steps_s, events = plan_for(zero, options.pp, options.microbatches), list[float](), list[list[str]]()
    for seconds in (0.0, options.seconds):
        ranks = pool.run(traced, plan, seconds, options.steps, world_size=plan.world_size)
        steps = zip(*(times for times, _ in ranks), strict=True)
        steps_s.append(min(max(times) for times in steps))  # what disturbs a machine only adds to it
        events = [before_messages(found) for _, found in ranks[::DP]]
    fast_s, slow_s = steps_s
    return {
        "zero": zero,
        "step_s": fast_s,
        "slowed_step_s": slow_s,
        "traced": (slow_s - fast_s) / options.seconds,
        "replayed": replayed(plan),
        "events": events,
    }


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=0.5, help="of one sum or gather")
    parser.add_argument("--pp", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    options = measure.options(parser)
    with Pool(timeout_s=600) as pool:
        rows = [point(pool, zero, options) for zero in measure.tracked([0, 1, 2, 3], lambda zero: f"ZeRO {zero}")]
    measure.save(options.out, rows)
    columns = ("zero", "step_s", "slowed_step_s", "traced", "replayed")
    measure.show("collectives that a step waits for", columns, ([row[name] for name in columns] for row in rows))


if __name__ == "__main__":
    main()
