"""How do the search's time and memory grow with layers, devices and strategies?

    python benchmarks/search_scale.py --out search_scale.json

LLaMA-3.1-405B, 8192 tokens, global batch 2048, on estimated H100 nodes of 8: first on 16,384 and 1,024 devices, then
one of layers, devices and strategies varied while the rest stays.  Every search has a process of its own.  Beside the
JSON a plot of each growth is written (``search_scale_layers.svg`` ...).
"""

from __future__ import annotations

import argparse
import itertools
import json
from typing import Any

import measure
import plot

from galvatron.core.files import write_atomic
from galvatron.core.model import ModelSpec
from galvatron.estimate import ClusterShape, estimate_model, model_spec
from galvatron.search import Limits, search

MIB = 2**20
DEVICES_PER_NODE = 8


def arguments() -> argparse.Namespace:
    parser = measure.parser(__doc__)
    parser.add_argument("--model", default="llama3.1-405b", help="a card with one kind of layers")
    parser.add_argument("--device", default="h100")
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--global-batch-size", type=int, default=2048)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1024, 16384], help="devices of the headline searches")
    parser.add_argument("--layers", type=int, nargs="*", default=[32, 64, 126, 256])
    parser.add_argument("--devices", type=int, nargs="*", default=[2**i for i in range(3, 15)])
    parser.add_argument("--max-tp", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64], help="to vary strategies")
    parser.add_argument("--growth-devices", type=int, default=1024, help="devices while layers and strategies vary")
    parser.add_argument("--repeats", type=int, default=1, help="processes of every point")
    parser.add_argument("--limit-s", type=float, default=900.0, help="wall seconds of one point")
    return measure.options(parser)


def points(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The headlines, then every growth, each with and without the simple plans."""
    fixed = {name: getattr(options, name) for name in ("model", "device", "seq_len", "global_batch_size")}
    fixed |= {"space": "all", "num_layers": None, "max_tp": None}
    at = {**fixed, "num_devices": options.growth_devices}
    rows = [{**fixed, "growth": "headline", "num_devices": n} for n in options.sizes]
    rows += [{**at, "growth": "layers", "num_layers": n} for n in options.layers]
    rows += [{**fixed, "growth": "devices", "num_devices": n} for n in options.devices]
    spaces = itertools.product(("runtime", "all"), options.max_tp)
    rows += [{**at, "growth": "strategies", "space": space, "max_tp": tp} for space, tp in spaces]
    every = itertools.product(rows, (False, True), range(options.repeats))
    return [{**row, "baselines": baselines, "repeat": repeat} for row, baselines, repeat in every]


def one(point: dict[str, Any]) -> dict[str, Any]:
    spec, shape = spec_of(point["model"], point["num_layers"]), shape_of(point["device"], point["num_devices"])
    hardware = shape.profile()
    model = estimate_model(spec, shape.preset, seq_len=point["seq_len"])
    loaded_bytes = measure.peak_rss_bytes()
    bounds = {} if point["max_tp"] is None else {"tp": point["max_tp"]}
    row, _ = measure.searched(
        lambda: search(
            model,
            hardware,
            global_batch_size=point["global_batch_size"],
            limits=Limits(point["space"], at_most=bounds),
            baselines=point["baselines"],
        )
    )
    sizes = {
        "num_layers": spec.num_layers,
        "loaded_rss_bytes": loaded_bytes,
        "peak_rss_bytes": measure.peak_rss_bytes(),
    }
    return {**row, **sizes}


def spec_of(card: str, num_layers: int | None) -> ModelSpec:
    """The card's model, with another number of its layers unless None."""
    spec = model_spec(card)
    if num_layers is None:
        return spec
    return spec.model_copy(update={"layers": (spec.layer.model_copy(update={"count": num_layers}),)})


def shape_of(device: str, num_devices: int) -> ClusterShape:
    per_node = min(num_devices, DEVICES_PER_NODE)
    return ClusterShape.parse(f"{device}:{num_devices // per_node}x{per_node}", ())


def words(point: dict[str, Any]) -> str:
    layers = f", {point['num_layers']} layers" if point["num_layers"] else ""
    bound = f", tp at most {point['max_tp']}" if point["max_tp"] else ""
    rivals = " with simple plans" * point["baselines"]
    return f"{point['growth']}: {point['num_devices']} devices{layers}, space {point['space']}{bound}{rivals}"


X_OF = {"layers": "num_layers", "devices": "num_devices", "strategies": "strategies"}


def x_of(row: dict[str, Any]) -> int | None:
    name = X_OF[row["growth"]]
    found: int | None = row["counts"][name] if name == "strategies" else row[name]
    return found


def panels(rows: list[dict[str, Any]], growth: str) -> list[plot.Panel]:
    """Seconds and memory over what grows; infeasible searches have no plan and are left out."""
    found = [row for row in rows if row["growth"] == growth and row["status"] == "found"]
    x_label = "most strategies of one layer" if growth == "strategies" else growth
    made = []
    for name, y_label, scale in (("cpu_s", "CPU seconds", 1), ("peak_rss_bytes", "Peak memory, MiB", MIB)):
        series: dict[str, list[tuple[float, float]]] = {}
        for row in found:
            space = f"{row['space']}, " if growth == "strategies" else ""
            label = space + ("with simple plans" if row["baselines"] else "search alone")
            series.setdefault(label, []).append((float(x_of(row) or 0), row[name] / scale))
        made.append(plot.Panel(f"{y_label.split(',')[0]} by {growth}", x_label, y_label, series))
    return made


def main() -> None:
    options = arguments()
    if options.point is not None:
        print(json.dumps(one(options.point)))
        return
    rows: list[dict[str, Any]] = []
    for point in measure.tracked(points(options), words):
        rows.append(measure.in_process(__file__, point, options.limit_s))
        measure.save(options.out, rows)  # a long run may be stopped
    for growth in X_OF:
        if any(row["growth"] == growth for row in rows):
            picture = options.out.with_name(f"{options.out.stem}_{growth}.svg")
            write_atomic(picture, plot.svg(panels(rows, growth)))
    columns = ("growth", "devices", "layers", "space", "max tp", "simple plans", "strategies", "tasks", "solved")
    measure.show("searches", (*columns, "CPU s", "peak MiB", "gap", "step s", "status"), map(line, rows))
    for row in (row for row in rows if row["growth"] == "headline" and row["status"] == "found"):
        print("\n".join(["", words(row), *row["plan"]]))


def line(row: dict[str, Any]) -> tuple[object, ...]:
    counts, peak = row.get("counts", {}), row.get("peak_rss_bytes")
    return (
        *(row[name] for name in ("growth", "num_devices", "num_layers", "space", "max_tp", "baselines")),
        *(counts.get(name) for name in ("strategies", "tasks", "solved")),
        row.get("cpu_s"),
        peak and round(peak / MIB),
        *(row.get(name) for name in ("gap", "step_time_s", "status")),
    )


if __name__ == "__main__":
    main()
