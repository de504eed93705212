"""``galvatron models``: which types of models are known, and whether one can be trained, shown on a tiny twin.

Takes a config or the names of types; gives text, and the data files of families.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Annotated

import typer

from galvatron.core.errors import ConfigError, GalvatronError
from galvatron.core.family import Experts
from galvatron.core.files import write_output

from .console import say
from .options import examples
from .survey import survey

HEADINGS = ("type", "attention", "MLP", "between embedding and layers", "proved with transformers")
DASHES = ("---",) * len(HEADINGS)

app = typer.Typer(name="models", help="List known models, and check others.", no_args_is_help=True)

app.command("survey", epilog=examples("galvatron models survey --out types.md"))(survey)


@app.command("list", epilog=examples("galvatron models list", "galvatron models list --markdown"))
def list_(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the table of docs/models.md.")] = False,
) -> None:
    """List the types whose shapes and proofs ship; other types are recognised when they are used."""
    from galvatron.core.family import known_families

    rows = [_row(name) for name in known_families()]
    if markdown:
        typer.echo("\n".join(f"| {' | '.join(row)} |" for row in [HEADINGS, DASHES, *rows]))
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _row(name: str) -> tuple[str, ...]:
    from galvatron.core.family import known_families

    known = known_families()[name]
    cuts = {"heads": "whole", "ffn": "whole"}
    for region in known.family.stacks[0].regions:
        cuts[region.row_blocks] = ", ".join(
            f"{path.rpartition('.')[2]} ({' + '.join(blocks)})" for path, blocks in region.columns.items()
        )
    if (experts := known.family.stacks[0].experts) is not None:
        cuts["ffn"] = f"experts: {_cuts_of(experts)}"
    before = ", ".join(path.rpartition(".")[2] for path in known.family.before) or "-"
    return name, cuts["heads"], cuts["ffn"], before, known.transformers


def _cuts_of(experts: Experts) -> str:
    return ", ".join(f"{name} ({' + '.join(['ffn'] * segments)})" for name, (_, segments) in experts.cuts.items())


@app.command(
    "check",
    epilog=examples(
        "galvatron models check path/to/config.json",
        "galvatron models check gemma2 phi3 --write src/galvatron/core/families",
    ),
)
def check(
    names: Annotated[
        list[str], typer.Argument(metavar="CONFIG...", help="config.json, directories, hub names or types.")
    ],
    write: Annotated[
        Path | None, typer.Option("--write", help="A folder for data files of types that are right.")
    ] = None,
) -> None:
    """Recognise models and compare the gradients of tiny twins, cut and in stages, with those of the whole."""
    wrong = False
    for name in names:
        try:
            wrong |= not _check(name, write)
        except GalvatronError as refusal:
            say(f"{name}: refused\n  {refusal}")
            wrong = True
    if wrong:
        raise typer.Exit(1)


def _check(name: str, write: Path | None) -> bool:
    """Say what is found of one model; whether it can be trained."""
    from transformers import CONFIG_MAPPING, AutoConfig

    from galvatron.models import family_of, load_config
    from galvatron.parallelize.proof import prove

    start = time.perf_counter()
    is_type = name in CONFIG_MAPPING
    config = AutoConfig.for_model(name) if is_type else load_config(name)
    family, proof = family_of(config), prove(config)
    say(f"{name}: {'right' if proof.whole is None else 'wrong'}")
    layers = ", ".join(stack.path for stack in family.stacks)
    say(f"  embedding {family.embedding}, layers {layers}, norm {family.norm}, head {family.head}")
    for region in itertools.chain.from_iterable(stack.regions for stack in family.stacks):
        columns = ", ".join(f"{path} by {' + '.join(blocks)}" for path, blocks in region.columns.items())
        say(f"  {columns}; then {region.row} by {region.row_blocks}")
    for experts in filter(None, (stack.experts for stack in family.stacks)):
        say(f"  experts {experts.module}, sent to by {experts.router}: {_cuts_of(experts)}")
    say(f"  stages, data parallelism, recompute: {proof.whole or 'gradients are those of the whole twin'}")
    say(f"  tensor parallelism of layers: {proof.tp or 'gradients are those of the whole twin'}")
    say(f"  {time.perf_counter() - start:.1f} s")
    if write is not None:
        if not is_type:
            raise ConfigError(f"data files describe types, got {name}; give model_type={config.model_type}")
        _write(name, write)
    return proof.whole is None


def compact(text: str) -> str:
    """The same JSON with a line for every parameter, region and setting."""
    lines = []
    for key, part in json.loads(text).items():
        if isinstance(part, list):
            rows = ",\n".join(f"  {json.dumps(row)}" for row in part)
            lines.append(f"{json.dumps(key)}: [\n{rows}\n ]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(part)}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def _write(model_type: str, folder: Path) -> None:
    from galvatron.models.describe import describe
    from galvatron.parallelize.proof import proved_structures

    known = describe(model_type, proved_structures(model_type))
    write_output(folder / f"{model_type}.json", compact(known.to_json()))
    say(f"  written to {folder / model_type}.json, {len(known.proved)} structures proved")
