"""What every benchmark of the search says beside its numbers, and how it takes them.

A *point* is one measurement.  Where memory or cold caches matter each runs in a process of its own:
``in_process(__file__, point)`` starts the script again with ``--point JSON`` and reads the JSON it prints last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from galvatron.core.errors import InfeasibleError
from galvatron.core.files import write_atomic
from galvatron.core.records import dump_json
from galvatron.core.version import __version__
from galvatron.plan import Plan
from galvatron.search import SearchResult

TESTS = Path(__file__).parent.parent / "tests"
Item = TypeVar("Item")
Result = TypeVar("Result")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with ``--out``, and ``--point`` for the processes that measure one point."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help="the JSON to write")
    made.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    return made


def options(made: argparse.ArgumentParser) -> argparse.Namespace:
    found = made.parse_args()
    if found.out is None and found.point is None:
        made.error("--out FILE.json says where to write the numbers")
    return found


def sweep_options(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The same, with what ``sweep`` asks for."""
    made.add_argument("--limit-s", type=float, default=600.0, help="wall seconds of one point")
    made.add_argument("--resume", action="store_true", help="keep the points that --out already has")
    return options(made)


def sweep(
    script: str,
    options: argparse.Namespace,
    wanted: Sequence[dict[str, Any]],
    words: Callable[[dict[str, Any]], str],
    summary: Callable[[Sequence[dict[str, Any]]], Any] | None = None,
) -> list[dict[str, Any]]:
    """The rows of all ``wanted`` points, written after each: a long run may be stopped, and resumed."""
    rows = []
    if options.resume:
        rows = [row for row in saved(options.out) if {name: row.get(name) for name in wanted[0]} in wanted]
    kept = [{name: row[name] for name in wanted[0]} for row in rows]
    for point in tracked([point for point in wanted if point not in kept], words):
        rows.append(in_process(script, point, options.limit_s))
        save(options.out, rows, **({} if summary is None else {"summary": summary(rows)}))
    return rows


def header() -> dict[str, Any]:
    """Date, machine, versions and command."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cpu": _cpu_model(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {"galvatron": __version__, "numpy": np.__version__, "python": platform.python_version()},
        "command": command(),
    }


def command() -> str:
    """What was typed; a package of benchmarks is run by its name."""
    script = Path(sys.argv[0])
    name = ["-m", f"benchmarks.{script.parent.name}"] if script.stem == "__main__" else [f"benchmarks/{script.name}"]
    return shlex.join(["python", *name, *sys.argv[1:]])


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """CPU seconds of this process during ``call``, and what it gave."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def searched(run: Callable[[], SearchResult]) -> tuple[dict[str, Any], SearchResult | None]:
    """CPU seconds of one search and what it found, as JSON and, unless nothing fits, as it is."""

    def attempt() -> SearchResult | InfeasibleError:
        try:
            return run()
        except InfeasibleError as error:
            return error

    seconds, found = timed(attempt)
    if isinstance(found, InfeasibleError):
        return {"status": "infeasible", "error": str(found), "cpu_s": seconds}, None
    proof = found.prediction.proof
    assert proof is not None
    row = {
        "status": "found",
        "cpu_s": seconds,
        "step_time_s": found.prediction.step_time_s,
        "objective_s": proof.objective_s,
        "gap": proof.gap,
        "peak_memory_bytes": found.prediction.peak_memory_bytes,
        "counts": asdict(found.counts),
        "plan": summary(found.plan),
    }
    return row, found


def summary(plan: Plan) -> list[str]:
    """The plan in a few lines: its layers by how many share a strategy, whatever their order."""
    shared = Counter(map(str, plan.layers))
    outside = plan.describe().splitlines()[0]
    layers = [f"{count} layers: {words}" for words, count in shared.most_common()]
    return [outside, f"embedding: {plan.embedding}", *layers, f"head: {plan.head}"]


def peak_rss_bytes() -> int:
    """The most memory this process has held.

    A process starts from its parent's figure, which says nothing here: the parent imports less than its points do.
    """
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts KiB


def in_process(script: str, point: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """``point`` with what a fresh process measured; ``status`` is ``timeout`` after ``limit_s`` wall seconds."""
    command = [sys.executable, script, "--point", json.dumps(point)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return {**point, "status": "timeout", "limit_s": limit_s}
    if done.returncode:
        return {**point, "status": "failed", "error": done.stderr.strip().splitlines()[-1:]}
    return {**point, **json.loads(done.stdout.splitlines()[-1])}


def tracked(items: Sequence[Item], words: Callable[[Item], str]) -> Iterator[Item]:
    """``items``, with a line on the terminal that says which one runs."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(items))
        for item in items:
            progress.update(task, description=words(item))
            yield item
            progress.advance(task)


def save(out: Path, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write the header, ``more`` (summaries) and the raw rows."""
    write_atomic(out, dump_json({**header(), **more, "rows": rows}))


def saved(out: Path) -> list[dict[str, Any]]:
    """The rows that an earlier run has written, none where there was none."""
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.is_file() else []
    return rows


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    Console(width=160 if not sys.stdout.isatty() else None).print(table)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "-" if value is None else str(value)
