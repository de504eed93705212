"""What came of it, for people: tables beside their targets, on the terminal and in Markdown.

Takes the rows of every part; gives tables and targets.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .children import Row
from .families import PEERS
from .peers import OURS

Parts = dict[str, dict[str, Any]]
FASTER = 1.05
MFU = {"1.2B": 0.50, "3B": 0.55}
TIME_ERROR, MEMORY_ERROR = 0.05, 0.03


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return f"## {self.title}\n\n" + "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines) + "\n"


@dataclass(frozen=True)
class Target:
    """``met`` is None where nothing was measured to tell."""

    what: str
    figure: str
    target: str
    met: bool | None


def cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def tables(parts: Parts, *, on_gpu: bool) -> list[Table]:
    """A table a part that has run, and that of the targets."""
    made = []
    for name, part in parts.items():
        title = f"{name}: {part['status']}, {part['seconds']:.0f} s"
        kind = "peers" if name.startswith("peers") else name
        columns, rows = _TABLES[kind](part["rows"])
        made.append(Table(title, columns, rows))
    rows = [[t.what, t.figure, t.target, t.met] for t in targets(parts, on_gpu=on_gpu)]
    return [*made, Table("targets", ["what", "figure", "target", "met"], rows)]


def targets(parts: Parts, *, on_gpu: bool) -> list[Target]:
    """What was aimed at beside what came out; a CPU's times are not judged, for others use it too."""
    found = []
    for name, what in (("modes", "modes"), ("parity", "plans of several ranks"), ("mixes", "mixes of several ranks")):
        if name in parts:
            rows = [row for row in parts[name]["rows"] if "holds" in row]
            held = sum(row["holds"] for row in rows)
            words = f"{what} that equal one CPU process"
            found.append(_target(words, f"{held} of {len(rows)}", "all", rows, held == len(rows)))
    if "predictions" in parts:
        found += _of_predictions(parts["predictions"]["rows"], on_gpu)
    for model, mfu in MFU.items():
        if on_gpu and f"peers {model}" in parts:
            found += _of_peers(model, mfu, parts[f"peers {model}"]["rows"])
    if "families" in parts:
        found += _of_families(parts["families"]["rows"], on_gpu)
    if "ranks" in parts:
        errors = [row["tensor_error"] for row in parts["ranks"]["rows"] if "tensor_error" in row]
        least = min(errors, default=0.0)
        found.append(_target("least memory error of larger plans", _percent(least), "never under", errors, least >= 0))
    return found


def _target(what: str, figure: str, target: str, measured: Sequence[object], met: bool) -> Target:
    return Target(what, figure, target, met) if measured else Target(what, "-", target, None)


def _of_predictions(rows: list[Row], on_gpu: bool) -> list[Target]:
    measured = [row for row in rows if "time_error" in row]
    times = [abs(row["time_error"]) for row in measured if on_gpu]
    memories = [row["memory_error"] for row in measured]
    sizes = [abs(error) for error in memories]
    least = min(memories, default=0.0)
    return [
        _target("plans predicted and measured", str(len(measured)), "at least 12", times, len(measured) >= 12),
        _target(
            "time error, median",
            _percent(_median(times)),
            f"at most {TIME_ERROR:.0%}",
            times,
            _median(times) <= TIME_ERROR,
        ),
        _target(
            "memory error, median",
            _percent(_median(sizes)),
            f"at most {MEMORY_ERROR:.0%}",
            sizes,
            _median(sizes) <= MEMORY_ERROR,
        ),
        _target("least memory error", _percent(least), "never under", memories, least >= 0),
    ]


def _of_peers(model: str, mfu: float, rows: list[Row]) -> list[Target]:
    ratios = ratios_to_fastest(rows)
    reached = causal_mfu(rows)
    spread = f"{_median(ratios):.3f} ({min(ratios, default=0):.3f} to {max(ratios, default=0):.3f})"
    return [
        _target(f"{model}: against the fastest peer", spread, f"at least {FASTER}", ratios, _median(ratios) >= FASTER),
        _target(
            f"{model}: causal MFU",
            _percent(reached),
            f"at least {mfu:.0%}",
            [r for r in [reached] if r],
            (reached or 0) >= mfu,
        ),
    ]


def _of_families(rows: list[Row], on_gpu: bool) -> list[Target]:
    by_model = _by_model(rows)
    measured = [row for row in rows if "time_error" in row]
    times = [abs(row["time_error"]) for row in measured if on_gpu]
    memories = [row["memory_error"] for row in measured]
    least = min(memories, default=0.0)
    ratios = {name: _median(ratios_to_fastest(_turns(of_one))) for name, of_one in by_model.items() if on_gpu}
    slowest = min(ratios, key=ratios.__getitem__, default="")
    figure = f"{slowest} {ratios[slowest]:.3f}" if ratios else "-"
    share, met = f"at most {TIME_ERROR:.0%}", _median(times) <= TIME_ERROR
    return [
        _target("families: time error, median", _percent(_median(times)), share, times, met),
        _target("families: least memory error", _percent(least), "never under", memories, least >= 0),
        _target(
            "families: least against the fastest peer",
            figure,
            "at least 1",
            [*ratios],
            min(ratios.values(), default=0.0) >= 1,
        ),
    ]


def _by_model(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["model"], []).append(row)
    return found


def _turns(rows: list[Row]) -> list[Row]:
    """Those of ``peers`` among one model's."""
    return [row for row in rows if "contender" in row]


def ratios_to_fastest(rows: list[Row]) -> list[float]:
    """How many times as fast as the fastest peer Galvatron was, in every round that both ran in."""
    steps = _steps(rows)
    peers = {
        name: _median([s for turn in turns.values() for s in turn]) for name, turns in steps.items() if name != OURS
    }
    if OURS not in steps or not peers:
        return []
    ours, fastest = steps[OURS], steps[min(peers, key=peers.__getitem__)]
    return [_median(fastest[turn]) / _median(ours[turn]) for turn in ours if turn in fastest]


def causal_mfu(rows: list[Row]) -> float | None:
    """Which part of the device's data sheet rate Galvatron's median step used, counting causal attention."""
    about, steps = rows[0], _steps(rows).get(OURS)
    if steps is None or about["peak_flops_per_s"] is None:
        return None
    return _mfu(about, [s for turn in steps.values() for s in turn])


def _mfu(about: Row, seconds: list[float]) -> float | None:
    if about["peak_flops_per_s"] is None:
        return None
    flops = about["causal_flops_per_token"] * about["tokens"]
    return float(flops / statistics.median(seconds) / about["peak_flops_per_s"])


def _steps(rows: list[Row]) -> dict[str, dict[int, list[float]]]:
    """Contender → round → seconds of its steps."""
    steps: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if "step_times_s" in row:
            steps.setdefault(row["contender"], {})[row["round"]] = row["step_times_s"]
    return steps


_Shown = tuple[list[str], list[list[object]]]


def _modes(rows: list[Row]) -> _Shown:
    columns = ["precision", "recompute", "compiled", "loss", "loss error", "gradient error", "holds"]
    return columns, [
        [row["precision"], row["recompute"], row["compiled"], row.get("loss")]
        + (
            [None, None, row["skipped"]]
            if "skipped" in row
            else [_error(row["loss_error"]), _error(row["gradient_error"]), row["holds"]]
        )
        for row in rows
    ]


def _predictions(rows: list[Row]) -> _Shown:
    columns = [
        "plan",
        "step, predicted",
        "measured",
        "error",
        "memory, predicted",
        "measured",
        "error",
        "tensors alone",
    ]
    shown: list[list[object]] = []
    for row in rows:
        if "profile" in row:
            shown.append([_profile(row["profile"]), f"made in {row['seconds']:.0f} s", *[None] * 6])
        elif "skipped" in row:
            shown.append([row["plan"], row["skipped"], *[None] * 6])
        else:
            median = statistics.median(row["step_times_s"])
            times = [_ms(row["predicted_step_time_s"]), _ms(median), _percent(row["time_error"])]
            memory = [_mib(row["predicted_memory_bytes"]), _mib(row["memory_bytes"]), _percent(row["memory_error"])]
            shown.append([row["plan"], *times, *memory, _percent(row["tensor_error"])])
    return columns, shown


def _profile(about: Row) -> str:
    context, slack = about["context_bytes"], about["allocator_slack_fraction"]
    words = f"profile, {'compiled' if about['compiled'] else 'eager'}: {about['attention_backend']} attention"
    return words if context is None else f"{words}, context {_mib(context)}, slack {slack:.1%}"


def _peers(rows: list[Row]) -> _Shown:
    columns = ["contender", "runs", "tokens/s", "spread", "causal MFU", "peak tensors", "ready after", "rounds"]
    about, steps, shown = rows[0], _steps(rows), list[list[object]]()
    last = {row["contender"]: row for row in rows if "step_times_s" in row}
    for name, turns in sorted(steps.items(), key=lambda item: _median([s for turn in item[1].values() for s in turn])):
        seconds = [s for turn in turns.values() for s in turn]
        rates = [about["tokens"] / s for s in seconds]
        peak = last[name]["peak_tensor_bytes"]
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        mfu = _percent(_mfu(about, seconds))
        rate = f"{statistics.median(rates):,.0f}"
        ready = f"{last[name]['prepared_s']:.0f} s"
        shown.append([name, last[name]["runs"], rate, spread, mfu, peak and _mib(peak), ready, len(turns)])
    skipped = [row for row in rows if "skipped" in row]
    return columns, shown + [[row["contender"], row["skipped"], *[None] * 6] for row in skipped]


def _families(rows: list[Row]) -> _Shown:
    columns = ["model", "step, predicted", "measured", "error", "memory, predicted", "measured", "error"]
    columns += ["samples/s", *(f"beside {name}" for name in PEERS), "peak tensors", *(f"of {name}" for name in PEERS)]
    shown: list[list[object]] = []
    for model, of_one in _by_model(rows).items():
        line: list[object] = [None] * 6
        for row in of_one:
            if "time_error" in row:
                line = _predictions([row])[1][0][1:7]
        turned = [row for row in _turns(of_one) if "step_times_s" in row]
        steps, turns = _steps(turned), {row["contender"]: row for row in turned}
        seconds = {name: _median(s for turn in steps[name].values() for s in turn) for name in steps}
        rate = f"{of_one[0]['samples'] / seconds[OURS]:,.1f}" if OURS in seconds else None
        ratios = [
            f"{seconds[name] / seconds[OURS]:.2f} x" if {name, OURS} <= seconds.keys() else None for name in PEERS
        ]
        peaks = [turns[name]["peak_tensor_bytes"] if name in turns else None for name in (OURS, *PEERS)]
        shown.append([model, *line, rate, *ratios, *(peak and _mib(peak) for peak in peaks)])
        shown += [
            [f"{model}: {row.get('contender', row.get('plan', ''))}", row["skipped"], *[None] * (len(columns) - 2)]
            for row in of_one
            if "skipped" in row
        ]
    return columns, shown


def _ranks(rows: list[Row]) -> _Shown:
    columns = ["plan", "devices", "tensors of rank 0, predicted", "measured", "error"]
    return columns, [
        [row["plan"], row["devices"]]
        + (
            [row["skipped"], None, None]
            if "skipped" in row
            else [_mib(row["predicted_tensor_bytes"]), _mib(row["tensor_bytes"]), _percent(row["tensor_error"])]
        )
        for row in rows
    ]


def _parity(rows: list[Row]) -> _Shown:
    columns = ["model", "plan", "ranks", "precision", "compiled", "loss error", "gradient error", "holds", "seconds"]
    shown: list[list[object]] = []
    for row in rows:
        about = [row[name] for name in columns[:5]]
        if "skipped" in row:
            shown.append([*about, None, None, row["skipped"], None])
            continue
        errors = [_error(row["worst"][kind]) if "worst" in row else None for kind in ("loss", "gradient")]
        shown.append([*about, *errors, row.get("reason", row["holds"]), f"{row['seconds']:.1f}"])
    return columns, shown


_TABLES = {"modes": _modes, "parity": _parity, "mixes": _parity, "predictions": _predictions, "peers": _peers}
_TABLES |= {"ranks": _ranks, "families": _families}


def _median(values: Iterable[float]) -> float:
    listed = list(values)
    return statistics.median(listed) if listed else 0.0


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"


def _error(value: float) -> str:
    return f"{value:.1e}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"


def _mib(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"
