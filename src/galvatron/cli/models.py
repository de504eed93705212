"""``galvatron models``: which types of models are known, and whether one can be trained, shown on a tiny twin.

Takes a config or the names of types; gives text, and the data files of families.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from galvatron.core.errors import ConfigError, GalvatronError
from galvatron.core.family import Blocks, Experts, Stack
from galvatron.core.files import write_output

from .console import console, say
from .options import TaskName, examples
from .survey import survey

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from galvatron.core.tasks import Task

HEADINGS = ("type", "task", "attention", "MLP", "outside the layers", "proved with transformers")
LIST_WIDTH = 100
DASHES = ("---",) * len(HEADINGS)

app = typer.Typer(name="models", help="List known models, and check others.", no_args_is_help=True)

app.command("survey", epilog=examples("galvatron models survey --out types.md"))(survey)


@app.command("list", epilog=examples("galvatron models list", "galvatron models list --markdown"))
def list_(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the table of docs/models.md.")] = False,
) -> None:
    """List the types and tasks whose shapes and proofs ship; other types are recognised when they are used."""
    from galvatron.core.known import known_families

    rows = [_row(name) for name in known_families()]
    if markdown:
        typer.echo("\n".join(f"| {' | '.join(row)} |" for row in [HEADINGS, DASHES, *rows]))
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in HEADINGS[:-1]:
        table.add_column(name, no_wrap=name in ("type", "task"), overflow="fold")
    for row in rows:
        table.add_row(*row[:-1])
    console().print(table, width=min(LIST_WIDTH, console().width), markup=False)
    versions = ", ".join(sorted({row[-1] for row in rows}))
    say(f"Linears by what tensor parallelism cuts them by, proved with transformers {versions}.")


def _row(name: str) -> tuple[str, ...]:
    from galvatron.core.known import known_families

    known = known_families()[name]
    stacks = known.family.stacks
    attention, mlp = (_columns(stacks, blocks) for blocks in ("heads", "ffn"))
    experts = [f"experts: {_cuts_of(stack.experts)}" for stack in stacks if stack.experts is not None]
    before = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in known.family.before)) or "-"
    cuts = ("; ".join(found) or "whole" for found in (attention, [*mlp, *experts]))
    return known.family.model_type, known.family.task, *cuts, before, known.transformers


def _columns(stacks: Iterable[Stack], blocks: Blocks) -> list[str]:
    """The columns of every region that is cut by ``blocks``, each kind once."""
    regions = (region for stack in stacks for region in stack.regions if region.row_blocks == blocks)
    rows = (
        ", ".join(f"{path.rpartition('.')[2]} ({' + '.join(cut)})" for path, cut in region.columns.items())
        for region in regions
    )
    return list(dict.fromkeys(rows))


def _cuts_of(experts: Experts) -> str:
    return ", ".join(f"{name} ({' + '.join(['ffn'] * segments)})" for name, (_, segments) in experts.cuts.items())


@app.command(
    "check",
    epilog=examples(
        "galvatron models check path/to/config.json",
        "galvatron models check gemma2 phi3 --write src/galvatron/core/families",
        "galvatron models check bert --task text_classification",
    ),
)
def check(
    names: Annotated[
        list[str], typer.Argument(metavar="CONFIG...", help="config.json, directories, hub names or types.")
    ],
    task: TaskName = None,
    write: Annotated[
        Path | None, typer.Option("--write", help="A folder for data files of types that are right.")
    ] = None,
) -> None:
    """Recognise models and compare the gradients of tiny twins, cut and in stages, with those of the whole."""
    import torch

    torch.set_num_threads(1)  # of what is tiny they wait for each other longer than they work
    wrong = False
    for name in names:
        try:
            wrong |= not _check(name, task, write)
        except GalvatronError as refusal:
            say(f"{name}: refused\n  {refusal}")
            wrong = True
    if wrong:
        raise typer.Exit(2)


def _check(name: str, task: Task | None, write: Path | None) -> bool:
    """Say what is found of one model; whether it can be trained."""
    from transformers import CONFIG_MAPPING

    from galvatron.models import family_of, for_task, load_config, task_of
    from galvatron.models.types import usual_config
    from galvatron.parallelize.proof import prove

    start = time.perf_counter()
    is_type = name in CONFIG_MAPPING
    config = usual_config(name) if is_type else load_config(name, task)
    config = for_task(config, task or task_of(config))
    family, proof = family_of(config), prove(config)
    say(f"{name}: {'right' if proof.whole is None else 'wrong'}, {family.task}")
    layers = ", ".join(stack.path for stack in family.stacks)
    before, after = (", ".join(paths) for paths in (family.before, family.after))
    around = {"before": before, "after": after} if family.ends == "whole" else {"norm": family.norm}
    parts = {"embedding": family.embedding, "layers": layers, **around, "head": family.head}
    say("  " + "; ".join(f"{name} {path}" for name, path in parts.items() if path))
    for line in dict.fromkeys(itertools.chain.from_iterable(map(_cuts_said, family.stacks))):
        say(f"  {line}")
    say(f"  stages, data parallelism, recompute: {proof.whole or 'gradients are those of the whole twin'}")
    say(f"  tensor parallelism of layers: {proof.tp or 'gradients are those of the whole twin'}")
    say(f"  {time.perf_counter() - start:.1f} s")
    if write is not None:
        if not is_type:
            raise ConfigError(f"data files describe types, got {name}; give model_type={config.model_type}")
        _write(config, write)
    return proof.whole is None


def _cuts_said(stack: Stack) -> Iterator[str]:
    """How the layers of a stack are cut, a line a region."""
    for region in stack.regions:
        columns = ", ".join(f"{path} by {' + '.join(blocks)}" for path, blocks in region.columns.items())
        yield f"{columns}; then {region.row} by {region.row_blocks}"
    if stack.experts is not None:
        experts = stack.experts
        yield f"experts {experts.module}, sent to by {experts.router}: {_cuts_of(experts)}"


def _write(config: PretrainedConfig, folder: Path) -> None:
    from transformers import AutoConfig

    from galvatron.models import task_of
    from galvatron.models.describe import describe
    from galvatron.parallelize.proof import proved_structures

    known = describe(config, proved_structures(config))
    usual = task_of(AutoConfig.for_model(config.model_type))
    task = known.family.task
    path = folder / f"{config.model_type}{'' if task == usual else f'.{task}'}.json"
    write_output(path, known.to_json())
    say(f"  written to {path}, {len(known.proved)} structures proved")
