"""How far are estimated step times from published runs, and would they have chosen the fastest of them?

    python benchmarks/published_runs.py --runs RUNS --out published_runs.json

RUNS holds ``ground_truth_single.csv`` and ``ground_truth_multi.csv`` as the vTrain project publishes them: GPT models
trained on nodes of 8 A100 80 GB by Megatron-DeepSpeed, a row a run with its degrees and its iteration time.  Every run
is written as a plan (1F1B, data parallel replicas, full recompute, bf16), its step predicted from the ``a100-80g``
preset and from what that engine did otherwise than ours (``megatron.py``), and held against the time it took.
*Regret*: of all runs of one job (model, devices, batch), by how much that with the least predicted time is slower than
the fastest.  One constant of the estimates is fitted on these runs (``BACKWARD_DISPATCH`` in ``estimate/compute.py``).
"""

from __future__ import annotations

import argparse
import csv
import functools
import statistics
from pathlib import Path
from typing import Any

import measure
import megatron
import numpy as np

from galvatron.core.hardware import HardwareProfile
from galvatron.core.model_profile import ModelProfile
from galvatron.cost import predict
from galvatron.estimate import ClusterShape, estimate_model, spec_of_config
from galvatron.plan import LayerStrategy, Plan

FILES = {"one node": "ground_truth_single.csv", "many nodes": "ground_truth_multi.csv"}
VOCABULARY = 51_200  # GPT-2's 50,257 words as Megatron-LM pads them for 8 ranks
DEVICE, DEVICES_PER_NODE = "a100-80g", 8
COLUMNS = {
    "devices": "# GPUs",
    "batch": "global batch",
    "micro_batch": "micro batch",
    "hidden": "hidden size",
    "heads": "attention heads",
    "layers": "# layers",
    "seq_len": "sequence length",
    "tp": "tensor parallelism",
    "dp": "data parallelism",
    "pp": "pipeline parallelism",
}
JOB = ("devices", "batch", "hidden", "heads", "layers", "seq_len")


def arguments() -> argparse.Namespace:
    parser = measure.parser(__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder with the two files")
    return measure.options(parser)


def runs(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [
            {name: int(row[column]) for name, column in COLUMNS.items()}
            | {"measured_s": float(row["iteration time (ms)"]) / 1e3}
            for row in csv.DictReader(file)
        ]


@functools.cache
def hardware_of(devices: int) -> HardwareProfile:
    per_node = min(devices, DEVICES_PER_NODE)
    shape = ClusterShape.parse(f"{DEVICE}:{devices // per_node}x{per_node}", megatron.LINKS)
    return megatron.hardware_of(shape)


@functools.cache
def model_of(hidden: int, heads: int, layers: int, seq_len: int) -> ModelProfile:
    config = {
        "model_type": "gpt2",
        "n_embd": hidden,
        "n_head": heads,
        "n_layer": layers,
        "n_positions": seq_len,
        "vocab_size": VOCABULARY,
    }
    return megatron.model_of(estimate_model(spec_of_config(config, "gpt2"), DEVICE, seq_len=seq_len), DEVICE)


def plan_of(run: dict[str, Any]) -> Plan:
    pp, layers = run["pp"], run["layers"]
    strategy = LayerStrategy(tp=run["tp"], dp_replicate=run["dp"])
    return Plan(
        model="gpt2",
        world_size=run["devices"],
        layers_per_stage=tuple(layers // pp + (stage < layers % pp) for stage in range(pp)),
        num_microbatches=run["batch"] // (run["micro_batch"] * run["dp"]),
        global_batch_size=run["batch"],
        seq_len=run["seq_len"],
        precision="bf16",
        grad_reduce_dtype=megatron.GRADIENT_DTYPE,
        embedding=strategy,
        layers=(strategy.model_copy(update={"recompute": "full"}),) * layers,
        head=strategy,
    )


def predicted_s(run: dict[str, Any]) -> float:
    model = model_of(run["hidden"], run["heads"], run["layers"], run["seq_len"])
    return predict(plan_of(run), model, hardware_of(run["devices"])).step_time_s


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [row["predicted_s"] / row["measured_s"] for row in rows]
    jobs: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for row in rows:
        jobs.setdefault(tuple(row[name] for name in JOB), []).append(row)
    choices = [group for group in jobs.values() if len(group) > 1]
    regrets = [
        min(group, key=lambda row: row["predicted_s"])["measured_s"] / min(row["measured_s"] for row in group) - 1
        for group in choices
    ]
    return {
        "runs": len(rows),
        "median_ratio": statistics.median(ratios),
        "mean_absolute_error": statistics.mean(abs(ratio - 1) for ratio in ratios),
        "rank_correlation": rank_correlation(rows),
        "jobs": len(choices),
        "median_regret": statistics.median(regrets),
        "mean_regret": statistics.mean(regrets),
        "max_regret": max(regrets),
    }


def rank_correlation(rows: list[dict[str, Any]]) -> float:
    """Spearman's."""
    ranks = [np.argsort(np.argsort([row[name] for row in rows])) for name in ("predicted_s", "measured_s")]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    options = arguments()
    rows = []
    for where, name in FILES.items():
        found = [{"where": where, **run} for run in runs(options.runs / name)]
        rows += [
            {**run, "predicted_s": predicted_s(run)}
            for run in measure.tracked(found, lambda run: f"{run['where']}: {run['devices']} devices")
        ]
    table = [{"where": where, **summary([row for row in rows if row["where"] == where])} for where in FILES]
    measure.save(options.out, table)  # not the runs themselves, which belong to others
    measure.show("summary", tuple(table[0]), (tuple(row.values()) for row in table))


if __name__ == "__main__":
    main()
