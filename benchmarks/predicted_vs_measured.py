"""Do plans take the time and memory they promise, and is the chosen one the fastest?

    python benchmarks/predicted_vs_measured.py --memory 24MiB --out promises.json

Profiles gloo processes on this machine and the quickstart's model, searches, then trains a few steps under
the chosen plan, its runners-up and the simple plans.  Writes JSON: a row a plan, the rank correlation of
predicted and measured step times, and the regret: what the chosen plan loses to the fastest one measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from galvatron.core.files import write_atomic
from galvatron.core.hardware import HardwareProfile
from galvatron.core.job import TrainSection
from galvatron.core.model_profile import ModelProfile
from galvatron.core.records import dump_json
from galvatron.core.units import parse_bytes
from galvatron.models import load_config, meta_model
from galvatron.parallelize import init_world, parallelize
from galvatron.plan import Plan
from galvatron.profile import profile_hardware, profile_model
from galvatron.search import search
from galvatron.testing import Pool
from galvatron.train import PeakMemory, build_optimizer
from galvatron.train.optimizer import update

MODEL = str(Path(__file__).parent.parent / "examples/quickstart_model/config.json")
WARMUP_STEPS, STEPS = 3, 9


def profiles(seq_len: int) -> tuple[HardwareProfile, ModelProfile]:
    world = init_world("cpu")
    return profile_hardware(world), profile_model(load_config(MODEL), world, seq_len=seq_len)


def measure(plan: Plan) -> tuple[list[float], int]:
    """Seconds of every step after warm-up on this rank, and its peak of tensor bytes."""
    world = init_world("cpu")
    memory = PeakMemory(world.device)
    model = parallelize(meta_model(load_config(MODEL)), plan, world=world)
    section = TrainSection(global_batch_size=plan.global_batch_size, seq_len=plan.seq_len, num_steps=1)
    optimizer = build_optimizer(model.local_parameters, section)
    shape = (plan.global_batch_size, plan.seq_len + 1)
    tokens = torch.randint(0, model.spec.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(WARMUP_STEPS + STEPS):
        start = time.perf_counter()
        with memory.watch(model, optimizer):
            loss = model.train_step(tokens[:, :-1], tokens[:, 1:])
            update(optimizer, loss, model.clip_grad_norm_(None), 1.0)
            float(loss)
        seconds.append(time.perf_counter() - start)
    return seconds[WARMUP_STEPS:], memory.bytes()


def row(pool: Pool, name: str, plan: Plan) -> dict[str, Any]:
    assert plan.prediction is not None
    ranks = pool.run(measure, plan, world_size=plan.world_size)
    steps = [max(times) for times in zip(*(seconds for seconds, _ in ranks), strict=True)]
    return {
        "name": name,
        "plan": plan.describe(),
        "predicted_step_time_s": plan.prediction.step_time_s,
        "measured_step_time_s": statistics.median(steps),
        "quartiles_s": statistics.quantiles(steps, n=4)[::2],
        "predicted_peak_memory_bytes": plan.prediction.peak_memory_bytes,
        "measured_peak_memory_bytes": max(peak for _, peak in ranks),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    predicted = np.array([r["predicted_step_time_s"] for r in rows])
    measured = np.array([r["measured_step_time_s"] for r in rows])
    memory = np.array([r["predicted_peak_memory_bytes"] / r["measured_peak_memory_bytes"] - 1 for r in rows])
    ranks = [np.argsort(np.argsort(values)) for values in (predicted, measured)]
    return {
        "mean_absolute_time_error": float(np.mean(np.abs(predicted / measured - 1))),
        "spearman": float(np.corrcoef(*ranks)[0, 1]),
        "regret": float(measured[0] / measured.min() - 1),
        "largest_memory_error": float(memory.max()),
        "smallest_memory_error": float(memory.min()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="24MiB")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--global-batch-size", type=int, default=8)
    parser.add_argument("--world-size", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with Pool(timeout_s=600) as pool:
        hardware, model = pool.run(profiles, options.seq_len, world_size=options.world_size)[0]
        limit = parse_bytes(options.memory)
        result = search(model, hardware, global_batch_size=options.global_batch_size, memory_limit_bytes=limit)
        plans = {"chosen": result.plan}
        plans |= {f"runner-up {i}": plan for i, plan in enumerate(result.candidates, start=1)}
        plans |= {name: plan for name, plan in result.baselines.items() if plan is not None}
        rows = [row(pool, name, plan) for name, plan in plans.items()]
    report = {
        "torch": torch.__version__,
        "device": hardware.device.model_dump(),
        "summary": summary(rows),
        "rows": rows,
    }
    write_atomic(options.out, dump_json(report))
    print(dump_json(report["summary"]))


if __name__ == "__main__":
    main()
