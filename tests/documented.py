"""The commands that README, docs and the verbs' help show, collected, and a folder where all of them can run.

Sizes are made small by ``SMALLER``; every word but those is run as it is shown.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import typer.main

from galvatron.cli import app
from galvatron.plan import LayerStrategy, Plan
from jobs import CONFIG, job_text
from unit.exchange.hetu_fixtures import SPEC, hardware_files, one_kind_files
from unit.profiles import make_hardware, make_model

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
STARTERS = ("galvatron", "torchrun", "srun", "make", "pip")
SMALLER = (
    (r"models survey (?!\w)", "models survey opt "),
    (r"(--nproc|--nproc-per-node|--ntasks-per-node) \d+", r"\1 2"),
    (r"--nnodes 2", "--nnodes 1"),
    (r"HOST:29500", "localhost:0"),
    (r"64-512", "64-128"),
    (r"(profile model .*--seq-len) \d+", r"\1 16"),
    (r"--hardware hardware --out profiles", "--hardware hardware --out profiles --seq-len 128 --model shapes.json"),
)
LONG = {**CONFIG, "max_position_embeddings": 4096}
HETU_PLAN = {
    "pp_deg": 2, "tp_sizes_enc": "1,2", "tp_consecutive_flags": "1,1", "dp_types_enc": "1,0", "use_sp": "0,0",
    "checkpoint": "1,0", "global_bsz": 16, "chunks": 2, "pp_division": "1,1", "pipeline_type": "pipedream_flush",
    "default_dp_type": "zero2", "vtp": 2, "vsp": 0, "embed_sdp": 1,
}  # fmt: skip


def verbs(command: click.Command | None = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every verb as (its words, its click command)."""
    command = command or typer.main.get_command(app)
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, child in command.commands.items():
        yield from verbs(child, (*path, name))


def commands() -> list[str]:
    """Whole commands, of code blocks and of epilogs, each once."""
    shown = [line for page in PAGES for line in _blocks(page.read_text(encoding="utf-8"))]
    shown += [line.strip() for _, verb in verbs() for line in (verb.epilog or "").splitlines()]
    lines = (line.removeprefix("$ ").partition(" #")[0].strip() for line in shown)
    return list(dict.fromkeys(line for line in lines if line.split(" ")[0] in STARTERS and "|" not in line))


def mentions() -> list[str]:
    """``galvatron …`` within sentences: not always whole."""
    texts = [text for page in PAGES for text in re.findall(r"`(galvatron [^`]+)`", page.read_text(encoding="utf-8"))]
    return list(dict.fromkeys(" ".join(text.split()) for text in texts))


def _blocks(page: str) -> Iterator[str]:
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        if not language:
            yield from block.splitlines()


def small(command: str) -> list[str]:
    """The words of ``command`` for two processes and short sequences."""
    for pattern, smaller in SMALLER:
        command = re.sub(pattern, smaller, command)
    return shlex.split(command)


def furnish(folder: Path) -> None:
    """Put every file that the commands read into ``folder``, under the names that they use, but no run."""
    for name in ("config.json", "path/to/config.json", "meta-llama/Llama-3.2-1B/config.json"):
        _write(folder / name, json.dumps(LONG))
    _write(folder / "examples/quickstart_model/config.json", json.dumps(LONG))
    _write(folder / "text.txt", "All work and no play. " * 40)
    _write(folder / "job.toml", job_text())
    _write(folder / "examples/quickstart.toml", job_text().replace('= "', '= "../').replace("../cpu", "cpu"))
    sharded, cut = LayerStrategy(dp_shard=2, zero=3), LayerStrategy(tp=2)
    for name, layer in (("plan", sharded), ("other-plan", cut), ("other", cut), ("another", cut)):
        Plan(
            model="tiny",
            world_size=2,
            layers_per_stage=(2,),
            global_batch_size=4,
            seq_len=16,
            embedding=layer,
            layers=(layer, layer),
            head=layer,
        ).save(folder / f"{name}.json")
    hardware = make_hardware(4)
    large = hardware.device.model_copy(update={"memory_bytes": 80 << 30})
    hardware.model_copy(update={"device": large}).save(folder / "hardware.json")
    make_model().save(folder / "model.json")
    _furnish_hetu(folder)


def _furnish_hetu(folder: Path) -> None:
    _write(folder / "galvatron_config.json", json.dumps(HETU_PLAN))
    make_model(SPEC).save(folder / "shapes.json")
    for path in one_kind_files(folder):
        path.rename(folder / path.name.replace("toy", "llama2-7b_all").replace("_all_all", "_all"))
    hardware_files(folder / "hardware")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
