"""Does the additive objective that the search minimises agree with the replayed step?

    python benchmarks/replay_agreement.py --out replay_agreement.json

Made-up models and links (``tests/unit/profiles.py``).  *Balanced* plans: stages of equal work, an embedding and a head
that take no time, messages that take none; the objective is meant to be the step.  *Unbalanced* ones, for information:
uneven layers, ends and messages of their real size.  Writes JSON: a row a plan, and the largest relative
differences by schedule.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import measure

from galvatron.core.hardware import HardwareProfile
from galvatron.core.model import ENDS
from galvatron.core.model_profile import ModelProfile
from galvatron.cost import Setting, objective_s, replay
from galvatron.plan import LayerStrategy, Plan

sys.path.insert(0, str(measure.TESTS))
from unit.profiles import make_hardware, make_model, make_spec

SCHEDULES = (
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved", 2),
    ("interleaved", 3),
    ("interleaved", 4),
    ("zero_bubble", 1),
    ("zero_bubble", 3),
)
LAYERS_PER_CHUNK = 2
SEQ_LEN = 64
BALANCED_LATENCY_S = 1e-7  # the ends' own few collectives then take no time beside a layer's milliseconds
STRATEGIES: dict[str, dict[str, Any]] = {
    "one device": {},
    "dp 2": {"dp_replicate": 2},
    "dp 2, zero 1": {"dp_shard": 2, "zero": 1},
    "dp 2, zero 2": {"dp_shard": 2, "zero": 2},
    "dp 2, zero 3": {"dp_shard": 2, "zero": 3},
    "tp 2": {"tp": 2},
    "tp 2, recompute full": {"tp": 2, "recompute": "full"},
    "dp 2, recompute selective": {"dp_replicate": 2, "recompute": "selective"},
}


def arguments() -> argparse.Namespace:
    parser = measure.parser(__doc__)
    parser.add_argument("--pp", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--most-microbatches", type=int, default=64)
    parser.add_argument("--devices", nargs="+", default=["cuda", "cpu"], help="with overlap and without")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--seeds", type=int, default=20, help="unbalanced plans of every pipeline")
    return measure.options(parser)


def balanced_model(num_layers: int) -> ModelProfile:
    """Layers alone take time: ends are free, and so small that their optimizer and gathers are."""
    model = make_model(make_spec(num_layers, vocab=2), seq_len=SEQ_LEN)
    free = {"forward_s": 0.0, "backward_s": 0.0, "again_s": {}}
    compute = (s.model_copy(update=free) if s.unit in ENDS else s for s in model.compute)
    return model.model_copy(update={"compute": tuple(compute)})


def free_messages(hardware: HardwareProfile) -> HardwareProfile:
    free = {"latency_s": 0.0, "seconds_per_byte": 0.0}
    return hardware.model_copy(
        update={"links": tuple(k.model_copy(update=free) if k.op == "p2p" else k for k in hardware.links)}
    )


def pipelines(options: argparse.Namespace) -> Iterator[tuple[str, int, int, int]]:
    """(schedule, chunks, pp, microbatches), with m in multiples of pp that double."""
    for (schedule, chunks), pp in itertools.product(SCHEDULES, options.pp):
        m = pp
        while m <= options.most_microbatches:
            yield schedule, chunks, pp, m
            m *= 2


def plan_of(pipeline: tuple[str, int, int, int], layers_per_stage: list[int], layer: dict[str, Any], end: Any) -> Plan:
    schedule, chunks, pp, m = pipeline
    size = LayerStrategy.model_validate(layer).num_devices
    strategy, outer = LayerStrategy.model_validate(layer), LayerStrategy.model_validate(end)
    return Plan.model_validate(
        {
            "model": "toy",
            "world_size": pp * size,
            "layers_per_stage": layers_per_stage,
            "schedule": schedule,
            "model_chunks": chunks,
            "num_microbatches": m,
            "global_batch_size": 2 * m,
            "seq_len": SEQ_LEN,
            "embedding": outer,
            "layers": (strategy,) * sum(layers_per_stage),
            "head": outer,
        }
    )


def end_of(layer: dict[str, Any]) -> dict[str, Any]:
    """The ends' strategy in an unbalanced plan: their layers' own."""
    return {name: value for name, value in layer.items() if name != "recompute"}


def free_end_of(layer: dict[str, Any]) -> dict[str, Any]:
    """One that costs nothing a microbatch and needs no redistribution (tp's few bytes aside)."""
    size = LayerStrategy.model_validate(layer).num_devices
    return {"tp": layer["tp"]} if "tp" in layer else {"dp_replicate": size}


def compared(plan: Plan, model: ModelProfile, hardware: HardwareProfile) -> dict[str, Any]:
    plan.validate(model.spec, hardware.world_size)
    additive_s = objective_s(plan, Setting.of(plan, model, hardware))
    step_s = replay(plan, model, hardware).step_time_s
    return {"objective_s": additive_s, "step_time_s": step_s, "difference": additive_s / step_s - 1}


def named(pipeline: tuple[str, int, int, int], device: str, strategy: str) -> dict[str, Any]:
    schedule, chunks, pp, m = pipeline
    words = schedule if chunks == 1 else f"{schedule} v={chunks}"
    return {"schedule": words, "pp": pp, "num_microbatches": m, "device": device, "strategy": strategy}


def balanced_rows(pipeline: tuple[str, int, int, int], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    _, chunks, pp, _ = pipeline
    model = balanced_model(LAYERS_PER_CHUNK * pp * chunks)
    for device, strategy in itertools.product(options.devices, options.strategies):
        layer = STRATEGIES[strategy]
        plan = plan_of(pipeline, [LAYERS_PER_CHUNK] * (pp * chunks), layer, free_end_of(layer))
        hardware = free_messages(make_hardware(plan.world_size, device, latency_s=BALANCED_LATENCY_S))
        yield {"kind": "balanced", **named(pipeline, device, strategy), **compared(plan, model, hardware)}


def unbalanced_rows(pipeline: tuple[str, int, int, int], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    _, chunks, pp, _ = pipeline
    for seed in range(options.seeds):
        shake = random.Random(seed)
        device, strategy = shake.choice(options.devices), shake.choice(options.strategies)
        layers = [shake.randint(1, 2 * LAYERS_PER_CHUNK) for _ in range(pp)]
        entries = layers * chunks  # a stage's chunks are alike, as rules ask
        plan = plan_of(pipeline, entries, STRATEGIES[strategy], end_of(STRATEGIES[strategy]))
        rate = 10 ** shake.uniform(9, 11)
        model = make_model(make_spec(sum(entries)), seq_len=SEQ_LEN, seed=seed, flops_per_s=rate)
        hardware = make_hardware(plan.world_size, device, latency_s=10 ** shake.uniform(-6, -4), seed=seed)
        row = {"kind": "unbalanced", "seed": seed, **named(pipeline, device, strategy)}
        yield {**row, **compared(plan, model, hardware)}


def summary(rows: list[dict[str, Any]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """For all plans alike in ``names``: how many, the largest and the median difference, and the worst plan."""
    found = []
    for key in sorted({tuple(row[name] for name in names) for row in rows}):
        group = [row for row in rows if tuple(row[name] for name in names) == key]
        worst = max(group, key=lambda row: abs(row["difference"]))
        found.append(
            {
                **dict(zip(names, key, strict=True)),
                "plans": len(group),
                "worst_difference": worst["difference"],
                "median_difference": statistics.median(abs(row["difference"]) for row in group),
                "worst": f"pp {worst['pp']}, m {worst['num_microbatches']}, {worst['strategy']}",
            }
        )
    return found


def shown(title: str, table: list[dict[str, Any]]) -> None:
    percent = ("worst_difference", "median_difference")
    lines = [[f"{value:+.2%}" if name in percent else value for name, value in row.items()] for row in table]
    measure.show(title, tuple(table[0]), lines)


def main() -> None:
    options = arguments()
    every = list(pipelines(options))
    rows = []
    for pipeline in measure.tracked(every, lambda p: f"{p[0]}, {p[1]} chunks, pp {p[2]}, {p[3]} microbatches"):
        rows += [*balanced_rows(pipeline, options), *unbalanced_rows(pipeline, options)]
    by_schedule = summary(rows, ("kind", "device", "schedule"))
    by_strategy = summary([r for r in rows if r["kind"] == "balanced"], ("schedule", "strategy"))
    measure.save(options.out, rows, by_schedule=by_schedule, by_strategy=by_strategy)
    shown("objective against replay", by_schedule)
    shown("balanced plans by strategy", by_strategy)


if __name__ == "__main__":
    main()
