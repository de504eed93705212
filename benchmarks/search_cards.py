"""Does every published model get a valid plan, soon, proved, and never worse than a simple one?

    python benchmarks/search_cards.py --out search_cards.json

Every card on estimated clusters of 8, 64, 512 and 4,096 devices, in all that runs: the chosen plan breaks no
rule and fits, or no plan does; the best simple plan of every family is no faster, by the additive objective that
the search minimises or replayed; 15 CPU seconds and a gap of 0.1% are not exceeded; what is planned alone says why.
Every search has a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from typing import Any

import measure

from galvatron.core.hardware import HardwareProfile
from galvatron.core.model import ModelSpec
from galvatron.core.model_profile import ModelProfile
from galvatron.cost import Setting, objective_s, replay
from galvatron.estimate import CARDS, ClusterShape, estimate_model, model_spec
from galvatron.plan import Plan
from galvatron.search import Limits, SearchResult, search

DEVICES_PER_NODE = 8
MAX_SEQ_LEN = 4096
ROUNDING = 1e-9
MOST_CPU_S, MOST_GAP = 15.0, 1e-3


def arguments() -> argparse.Namespace:
    parser = measure.parser(__doc__)
    parser.add_argument("--cards", nargs="+", default=list(CARDS))
    parser.add_argument("--presets", nargs="+", default=["h100", "a100-80g"])
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--spaces", nargs="+", default=["runtime"])
    parser.add_argument("--global-batch-size", type=int, default=512, help="at least a sequence a device is taken")
    return measure.sweep_options(parser)


def natural_seq_len(spec: ModelSpec) -> int:
    """All positions that a model has, of long ones the first 4096."""
    return min(spec.max_seq_len, MAX_SEQ_LEN)


def one(point: dict[str, Any]) -> dict[str, Any]:
    spec, devices = model_spec(point["card"]), point["num_devices"]
    per_node = min(devices, DEVICES_PER_NODE)
    shape = ClusterShape.parse(f"{point['preset']}:{devices // per_node}x{per_node}", ())
    hardware, seq_len = shape.profile(), natural_seq_len(spec)
    model = estimate_model(spec, shape.preset, seq_len=seq_len)
    row, found = measure.searched(
        lambda: search(
            model, hardware, global_batch_size=point["global_batch_size"], limits=Limits.parse(point["space"])
        )
    )
    row = {"seq_len": seq_len, **row, "peak_rss_bytes": measure.peak_rss_bytes()}
    return row if found is None else {**row, **checks(found, model, hardware)}


def checks(found: SearchResult, model: ModelProfile, hardware: HardwareProfile) -> dict[str, Any]:
    """Raises PlanError where the plan breaks a rule; says how the simple plans compare."""
    found.plan.validate(model.spec, hardware.world_size)
    simple = {name: numbers(plan, model, hardware) for name, plan in found.baselines.items() if plan is not None}
    chosen = numbers(found.plan, model, hardware)
    best = {key: min((row[key] for row in simple.values()), default=None) for key in ("objective_s", "step_time_s")}
    proof = found.prediction.proof
    assert proof is not None
    optimum = proof.objective_s
    return {
        "fits": found.prediction.peak_memory_bytes <= found.memory_limit_bytes,
        "what_if": found.plan.what_if,
        "chosen": chosen,
        "simple": simple,
        "simple_beats_objective": best["objective_s"] is not None and best["objective_s"] < optimum * (1 - ROUNDING),
        "simple_beats_replay": best["step_time_s"] is not None
        and best["step_time_s"] < chosen["step_time_s"] * (1 - ROUNDING),
        "gain_over_simple": best["step_time_s"] and best["step_time_s"] / chosen["step_time_s"] - 1,
    }


def numbers(plan: Plan, model: ModelProfile, hardware: HardwareProfile) -> dict[str, float]:
    return {
        "objective_s": objective_s(plan, Setting.of(plan, model, hardware)),
        "step_time_s": replay(plan, model, hardware).step_time_s,
    }


def points(options: argparse.Namespace) -> list[dict[str, Any]]:
    every = itertools.product(options.presets, options.devices, options.cards, options.spaces)
    return [
        {
            "preset": preset,
            "num_devices": devices,
            "card": card,
            "space": space,
            "global_batch_size": max(options.global_batch_size, devices),
        }
        for preset, devices, card, space in every
    ]


def words(point: dict[str, Any]) -> str:
    return f"{point['card']} on {point['num_devices']} {point['preset']}, space {point['space']}"


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = [row for row in rows if row["status"] == "found"]
    seconds = [row["cpu_s"] for row in rows if "cpu_s" in row]
    return {
        "searches": len(rows),
        "valid_plans": len(found),
        "infeasible": sum(row["status"] == "infeasible" for row in rows),
        "timeouts": [words(row) for row in rows if row["status"] == "timeout"],
        "failed": [words(row) for row in rows if row["status"] == "failed"],
        "too_large": [words(row) for row in found if not row["fits"]],
        "slow": [words(row) for row in rows if row.get("cpu_s", 0.0) > MOST_CPU_S],
        "unproved": [words(row) for row in found if row["gap"] > MOST_GAP],
        "what_if": sorted({f"{row['card']}: {why}" for row in found for why in row["what_if"]}),
        "simple_beats_objective": [words(row) for row in found if row["simple_beats_objective"]],
        "simple_beats_replay": [words(row) for row in found if row["simple_beats_replay"]],
        "largest_gap": max((row["gap"] for row in found), default=None),
        "largest_replay_over_objective": max((_difference(row) for row in found), default=None),
        "median_cpu_s": statistics.median(seconds) if seconds else None,
        "max_cpu_s": max(seconds, default=None),
    }


def _difference(row: dict[str, Any]) -> float:
    return float(abs(row["chosen"]["step_time_s"] / row["chosen"]["objective_s"] - 1))


def main() -> int:
    options = arguments()
    if options.point is not None:
        print(json.dumps(one(options.point)))
        return 0
    rows = measure.sweep(__file__, options, points(options), words, summary)
    columns = ("card", "preset", "devices", "space", "status", "CPU s", "gap", "step s", "objective s", "over simple")
    measure.show("searches", columns, map(line, rows))
    total = summary(rows)
    measure.show("summary", ("", "all searches"), total.items())
    wrong = ("timeouts", "failed", "too_large", "slow", "unproved", "simple_beats_objective", "simple_beats_replay")
    return int(any(total[name] for name in wrong))


def line(row: dict[str, Any]) -> tuple[object, ...]:
    chosen = row.get("chosen", {})
    gain = row.get("gain_over_simple")
    return (
        *(row[name] for name in ("card", "preset", "num_devices", "space", "status")),
        *(row.get(name) for name in ("cpu_s", "gap")),
        *(chosen.get(name) for name in ("step_time_s", "objective_s")),
        None if gain is None else f"{gain:+.1%}",
    )


if __name__ == "__main__":
    raise SystemExit(main())
