"""How long does a search take on the reference system's own examples?

    python benchmarks/search_reference.py --profiles PROFILES --out search_reference.json
    python benchmarks/search_reference.py --profiles PROFILES --models t5-3b swin-huge --out reference_stacks.json

Searches LLaMA-2-7B, or models of two and four stacks, on 8 A100 from Hetu-Galvatron's measured profiles, for every
budget, batch and space, with and without the simple plans.  PROFILES holds a folder a model and ``hardware/`` as that
system ships them.  Every search has a process of its own and is repeated there: the first is what a user waits for, the
others find warm caches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

from galvatron.exchange import card_of_file, import_hardware, import_model, named_spec
from galvatron.search import Limits, SearchResult, search

GB = 10**9
DEVICE_MEMORY_BYTES = 80 * GB


def arguments() -> argparse.Namespace:
    parser = measure.parser(__doc__)
    parser.add_argument("--profiles", type=Path, help="folder with hardware/ and one a model")
    parser.add_argument("--models", nargs="+", default=["llama2-7b"], choices=["llama2-7b", "t5-3b", "swin-huge"])
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 20, 24, 36, 40, 80], help="GB (10^9 bytes)")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--spaces", nargs="+", default=["runtime", "all"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit-s", type=float, default=600.0, help="wall seconds of one point")
    options = measure.options(parser)
    if options.point is None and options.profiles is None:
        parser.error("--profiles DIR says where the measured profiles are")
    return options


def searcher(point: dict[str, Any]) -> Callable[[], SearchResult]:
    folder = Path(point["profiles"])
    (computation,) = (folder / point["model"]).glob("computation_profiling_*.json")
    (memory,) = (folder / point["model"]).glob("memory_profiling_*.json")
    model = import_model(computation, memory, named_spec(card_of_file(computation)))
    hardware, _ = import_hardware(folder / "hardware", 1, 8, DEVICE_MEMORY_BYTES)

    def run() -> SearchResult:
        return search(
            model,
            hardware,
            global_batch_size=point["global_batch_size"],
            memory_limit_bytes=point["memory_limit_bytes"],
            limits=Limits.parse(point["space"]),
            baselines=point["baselines"],
        )

    return run


def one(point: dict[str, Any]) -> dict[str, Any]:
    """One search repeated: seconds of every repeat, and what it found."""
    run = searcher(point)
    repeats = [measure.searched(run)[0] for _ in range(point["repeats"])]
    return {**repeats[-1], "cpu_s": [found["cpu_s"] for found in repeats]}


def points(options: argparse.Namespace) -> list[dict[str, Any]]:
    every = itertools.product(options.models, options.spaces, (False, True), options.budgets, options.batches)
    return [
        {
            "profiles": str(options.profiles),
            "model": model,
            "space": space,
            "baselines": baselines,
            "memory_limit_bytes": budget * GB,
            "global_batch_size": batch,
            "repeats": options.repeats,
        }
        for model, space, baselines, budget, batch in every
    ]


def words(point: dict[str, Any]) -> str:
    budget, rivals = point["memory_limit_bytes"] // GB, " with simple plans" * point["baselines"]
    return f"{point['model']}, {point['space']}{rivals}, {budget} GB, batch {point['global_batch_size']}"


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds of first searches and of all, and their spread, by model, space and whether simple plans are sought."""
    found = []
    for key in dict.fromkeys((row["model"], row["space"], row["baselines"]) for row in rows):
        group = [row for row in rows if (row["model"], row["space"], row["baselines"]) == key]
        measured = [row for row in group if "cpu_s" in row]
        first, spreads = [row["cpu_s"][0] for row in measured], [max(r["cpu_s"]) / min(r["cpu_s"]) for r in measured]
        found.append(
            {
                **dict(zip(("model", "space", "baselines"), key, strict=True)),
                "searches": len(group),
                "infeasible": sum(row["status"] == "infeasible" for row in group),
                "unmeasured": len(group) - len(measured),
                "median_first_cpu_s": statistics.median(first) if first else None,
                "max_first_cpu_s": max(first, default=None),
                "median_cpu_s": statistics.median(s for row in measured for s in row["cpu_s"]) if measured else None,
                "max_cpu_s": max((s for row in measured for s in row["cpu_s"]), default=None),
                "median_spread": statistics.median(spreads) - 1 if spreads else None,
                "max_spread": max(spreads, default=1.0) - 1,
                "max_gap": max((row["gap"] for row in group if row["status"] == "found"), default=None),
            }
        )
    return found


def main() -> None:
    options = arguments()
    if options.point is not None:
        print(json.dumps(one(options.point)))
        return
    rows = []
    for point in measure.tracked(points(options), words):
        row = measure.in_process(__file__, point, options.limit_s)
        rows.append({name: value for name, value in row.items() if name != "profiles"})
    table = summary(rows)
    measure.save(options.out, rows, summary=table)
    columns = (
        "model",
        "GB",
        "batch",
        "space",
        "simple plans",
        "CPU s first",
        "CPU s median",
        "gap",
        "step s",
        "status",
    )
    measure.show("searches", columns, (line(row) for row in rows))
    measure.show("summary", tuple(table[0]), (tuple(row.values()) for row in table))


def line(row: dict[str, Any]) -> tuple[object, ...]:
    seconds = row.get("cpu_s")
    return (
        row["model"],
        row["memory_limit_bytes"] // GB,
        row["global_batch_size"],
        row["space"],
        row["baselines"],
        seconds and seconds[0],
        seconds and statistics.median(seconds),
        row.get("gap"),
        row.get("step_time_s"),
        row["status"],
    )


if __name__ == "__main__":
    main()
