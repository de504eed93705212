"""What do a checkpoint's checksums cost?

    python benchmarks/checkpoint_checksums.py --out checkpoint_checksums.json

First the checksums that the standard library and the dependencies have, over random bytes in memory.  Then saving,
loading and verifying fp32 weights with AdamW's moments in one process, as they are and with the checksums left out
(each is the same text, nothing is read for them), in turn.  Writes JSON: a row a measurement, in seconds of the clock
and of this process's CPU time, which other load on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import measure
import torch
import xxhash

from galvatron.core.job import TrainSection
from galvatron.parallelize.state import safetensors_file
from galvatron.parallelize.state.pieces import LocalParameter, Piece
from galvatron.plan import LayerStrategy, Plan
from galvatron.train import index, load_checkpoint, save_checkpoint
from galvatron.train.checkpoint import TrainState
from galvatron.train.lineage import Lineage
from galvatron.train.optimizer import build_optimizer

SIDE = 2048  # of a square fp32 matrix: 16 MiB, 48 with its moments
ALGORITHMS: dict[str, Callable[[bytes], object]] = {
    "XXH3, 64 bits (xxhash)": lambda data: xxhash.xxh3_64_digest(data),
    "XXH3, 128 bits (xxhash)": lambda data: xxhash.xxh3_128_digest(data),
    "XXH64 (xxhash)": lambda data: xxhash.xxh64_digest(data),
    "CRC-32 (zlib)": zlib.crc32,
    "Adler-32 (zlib)": zlib.adler32,
    "SHA-256 (hashlib)": lambda data: hashlib.sha256(data).digest(),
    "BLAKE2b (hashlib)": lambda data: hashlib.blake2b(data).digest(),
}


def arguments() -> argparse.Namespace:
    parser = measure.parser(__doc__)
    parser.add_argument("--matrices", type=int, default=8, help="of 16 MiB in the checkpoint")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where checkpoints are written; a temporary one by default")
    return measure.options(parser)


def algorithms(num_bytes: int, repeats: int) -> Iterator[dict[str, Any]]:
    data = os.urandom(num_bytes)
    for name, function in ALGORITHMS.items():
        times = [_times(lambda f=function: f(data)) for _ in range(repeats)]
        best = min(cpu_s for _, cpu_s in times)
        yield {"what": name, "bytes": num_bytes, "wall_and_cpu_s": times, "gb_per_s": num_bytes / best / 1e9}


def checkpoints(root: Path, num_matrices: int, repeats: int) -> Iterator[dict[str, Any]]:
    model, optimizer, save = _run(num_matrices)
    directory = save(root)
    num_bytes = index.CheckpointIndex.load(directory / index.INDEX_FILE).num_bytes
    entries = index.CheckpointIndex.load(directory / index.INDEX_FILE)
    points: list[tuple[str, bool, Callable[[], object]]] = [
        ("verify", True, lambda: entries.check(directory)),
        ("load", True, lambda: load_checkpoint(directory, model, optimizer)),
        ("load", False, lambda: load_checkpoint(directory, model, optimizer)),
        ("save", True, lambda: save(root / "new")),
        ("save", False, lambda: save(root / "new")),
    ]
    for repeat in range(repeats):
        for what, checksums, call in points[:: 1 if repeat % 2 else -1]:
            with _left_out(not checksums):
                wall_s, cpu_s = _times(call)
            shutil.rmtree(root / "new", ignore_errors=True)
            row = {"what": what, "checksums": checksums, "repeat": repeat, "bytes": num_bytes}
            yield {**row, "wall_s": wall_s, "cpu_s": cpu_s}


def _run(num_matrices: int) -> tuple[Any, torch.optim.Optimizer, Callable[[Path], Path]]:
    whole = Piece((0, 0), (0, 0), (SIDE, SIDE))
    parts = [
        LocalParameter(
            f"layers.{i}.weight", torch.nn.Parameter(torch.randn(SIDE, SIDE)), (SIDE, SIDE), (whole,), 1, True
        )
        for i in range(num_matrices)
    ]
    model = SimpleNamespace(local_parameters=parts, config=SimpleNamespace(to_json_string=lambda use_diff: "{}\n"))
    section = TrainSection(global_batch_size=1, seq_len=8, num_steps=10)
    optimizer = build_optimizer(parts, section)
    one = LayerStrategy()
    plan = Plan(
        model="m", world_size=1, layers_per_stage=(1,), embedding=one, layers=(one,), head=one,
        global_batch_size=1, seq_len=8,
    )  # fmt: skip
    state = TrainState(step=1, world_size=1, run=Lineage(train=section, config={}, eval_fraction=0.0, versions={}))
    return model, optimizer, lambda root: save_checkpoint(root, model, optimizer, state, plan=plan, keep=1)  # type: ignore[arg-type]


@contextmanager
def _left_out(leave_out: bool) -> Iterator[None]:
    if not leave_out:
        yield
        return
    with (
        mock.patch.object(safetensors_file, "checksum", return_value=""),
        mock.patch.object(index.CheckpointIndex, "check", return_value=None),
    ):
        yield


def _times(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock and of this process's CPU time."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


def main() -> None:
    options = arguments()
    rows = list(algorithms(1 << 28, options.repeats))
    measure.show("In memory, best CPU time", ["checksum", "GB/s"], [(row["what"], row["gb_per_s"]) for row in rows])
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        found = list(checkpoints(Path(folder), options.matrices, options.repeats))
    table = []
    for what, checksums in sorted({(row["what"], row["checksums"]) for row in found}):
        same = [row for row in found if (row["what"], row["checksums"]) == (what, checksums)]
        table.append((what, checksums, *(statistics.median(row[key] for row in same) for key in ("wall_s", "cpu_s"))))
    title = f"One process, {found[0]['bytes'] / 1e9:.2f} GB, medians"
    measure.show(title, ["", "checksums", "wall s", "CPU s"], table)
    measure.save(options.out, [*rows, *found])


if __name__ == "__main__":
    main()
