"""``python -m benchmarks.gpu``: the parts in turn, each within its seconds; JSON and Markdown after every one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from benchmarks import measure

from galvatron.core.files import write_atomic
from galvatron.core.records import dump_json

from . import __doc__ as questions
from . import families, modes, parity, peers, predictions, ranks
from .children import Child, Clock, CutShortError, Row, Start
from .report import Parts, cell, tables, targets
from .sizes import Device, describe

PARTS: dict[str, tuple[float, Callable[[Device, Clock], Iterator[Row]]]] = {
    "modes": (45, modes.run),
    "predictions": (150, predictions.run),
    "peers 1.2B": (75, partial(peers.run, "1.2B")),
    "peers 3B": (55, partial(peers.run, "3B")),
    "ranks": (20, ranks.run),
    "parity": (90, partial(parity.run, parity.pure)),
    "mixes": (150, partial(parity.run, parity.mixed)),
    "families": (400, families.run),
}
"""Every part with its share of the seconds; what one leaves goes to those after it."""


def main() -> None:
    parser = measure.parser(questions)
    parser.add_argument("--seconds", type=float, default=585.0, help="for all parts together")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help="by default all; on a CPU there is one model of peers"
    )
    options = measure.options(parser)
    about, parts = measured(options.out, options.device, options.seconds, options.parts)
    for table in tables(parts, on_gpu=about["type"] == "cuda"):
        measure.show(table.title, table.columns, [[*map(cell, row)] for row in table.rows])


def measured(out: Path, wanted: str, seconds: float, names: Sequence[str] | None = None) -> tuple[Row, Parts]:
    """(what was measured on, the parts), written to ``out`` after every part."""
    end, parts = Clock.of(seconds), Parts()
    about, start = _described(wanted, end)
    device = Device(about["type"], about["name"], about["memory_bytes"], start)
    left = {name: PARTS[name][0] for name in names or PARTS if names or device.is_gpu or name != "peers 3B"}
    while left:
        name, share = next(iter(left.items()))
        clock = Clock.of(end.left_s * share / sum(left.values()))
        del left[name]
        parts[name] = _part(name, PARTS[name][1], device, clock)
        write(out, about, parts)
    return about, parts


def _described(wanted: str, end: Clock) -> tuple[Row, Start]:
    """What is measured on, and how processes that can use it are started."""
    start: Start
    for start in ("forkserver", "spawn"):
        try:
            with Child(describe, wanted, start=start) as child:
                return dict(next(child.rows(end))), start
        except CutShortError as cut:
            reason = str(cut)
    raise SystemExit(f"the device cannot be used: {reason}")


def _part(name: str, run: Callable[[Device, Clock], Iterator[Row]], device: Device, clock: Clock) -> Row:
    start, rows, status = time.monotonic(), list[Row](), "whole"
    try:
        for row in run(device, clock):
            rows.append(row)
            told = {key: value for key, value in row.items() if isinstance(value, str | float | bool)}
            print(f"{time.monotonic() - start:6.1f} s  {name}: {told}", file=sys.stderr, flush=True)
    except CutShortError as cut:
        status = f"cut short ({cut})"
    return {"status": status, "seconds": time.monotonic() - start, "rows": rows}


def write(out: Path, about: Row, parts: Parts) -> None:
    """The JSON, and the same as Markdown beside it."""
    on_gpu = about["type"] == "cuda"
    figures = [asdict(target) for target in targets(parts, on_gpu=on_gpu)]
    write_atomic(out, dump_json({**measure.header(), "device": about, "targets": figures, "parts": parts}))
    head = f"# One device\n\n{about['name']}, torch {about['torch']}, CUDA {about['cuda']}: `{measure.command()}`\n\n"
    write_atomic(out.with_suffix(".md"), head + "\n".join(table.markdown() for table in tables(parts, on_gpu=on_gpu)))


if __name__ == "__main__":
    main()
