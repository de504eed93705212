"""``galvatron checkpoint``: whether saved runs are whole, and what they are.

Takes a checkpoint or a run directory; gives a line a checkpoint.  Loads nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from galvatron.core.errors import CheckpointError
from galvatron.core.units import counted, format_bytes

from .console import say
from .options import examples

SHOWN = 3  # damaged places that the error names

app = typer.Typer(name="checkpoint", help="Look after checkpoints.", no_args_is_help=True)


@app.command("verify", epilog=examples("galvatron checkpoint verify runs/quickstart"))
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint, or a run directory for all of its.")],
) -> None:
    """Read every byte of a checkpoint and hold it against the checksums that were saved with it.

    Exits with 2 if any checkpoint is damaged, after a line for each that is whole.
    """
    from galvatron.train import all_checkpoints

    damaged = [sentence for checkpoint in all_checkpoints(directory) if (sentence := _damage(checkpoint))]
    if damaged:
        raise CheckpointError("; ".join(damaged))


def _damage(directory: Path) -> str | None:
    """Say that ``directory`` is whole, or return a sentence on what is not."""
    from galvatron.train.checkpoint import read_state
    from galvatron.train.index import INDEX_FILE, CheckpointIndex

    try:
        index = CheckpointIndex.load(directory / INDEX_FILE)
        damage = list(index.damage(directory))
        if not damage:
            run = read_state(directory)
    except CheckpointError as error:
        return str(error)
    if damage:
        more = f" and {len(damage) - SHOWN} more" if len(damage) > SHOWN else ""
        return f"{directory} is damaged: {', '.join(damage[:SHOWN])}{more}; resume from another checkpoint"
    versions = ", ".join(f"{name} {version}" for name, version in run.run.versions.items())
    say(
        f"{directory} is whole: step {run.step:,} by {counted(run.world_size, 'process')} ({versions}), "
        f"{len(index.tensors):,} tensors, {format_bytes(index.num_bytes)} in {len(index.files)} files"
    )
    return None
