"""``galvatron convert``: weights out to and in from Hugging Face directories.

Takes a checkpoint, or a model's name; gives a directory of safetensors with its config.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from galvatron.core.errors import ConfigError, DataError
from galvatron.core.files import check_folder, new_folder

from .console import say
from .options import examples

app = typer.Typer(name="convert", help="Move weights to and from Hugging Face directories.", no_args_is_help=True)


@app.command(
    "to-hf",
    epilog=examples(
        "galvatron convert to-hf runs/quickstart exported",
        "galvatron convert to-hf runs/first exported --precision bf16",
    ),
)
def to_hf(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new directory.")],
    precision: Annotated[
        Literal["fp32", "bf16"], typer.Option("--precision", help="What weights are stored in; training keeps fp32.")
    ] = "fp32",
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="The tokenizer to put beside the weights; the run's own if left out."),
    ] = None,
    adapter_only: Annotated[
        bool,
        typer.Option("--adapter-only", help="Write the LoRA adapter alone, as peft does; it is merged if left out."),
    ] = False,
) -> None:
    """Export a checkpoint, whatever plan saved it, with what reads its inputs, to a directory for from_pretrained."""
    check_folder(out, "OUT", new=True)
    import torch

    from galvatron.train import checkpoint_to_hf, find_checkpoint, load_tokenizer

    source = find_checkpoint(checkpoint, checkpoint)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    beside = _own_processing(source) if tokenizer is None else load_tokenizer(tokenizer).for_transformers()
    checkpoint_to_hf(source, out, dtype=dtype, tokenizer=beside, adapter_only=adapter_only)
    say(f"wrote {out} from {source}")


def _own_processing(checkpoint: Path) -> Any:
    """What read the inputs of the run that saved ``checkpoint``; None, which is said, without it."""
    from galvatron.models import load_config, task_of
    from galvatron.train import processing_of, read_state

    data = read_state(checkpoint).run.data
    try:
        if data is not None:
            return processing_of(data, task_of(load_config(checkpoint)))
        say("no tokenizer is written, as the run had no job file; give --tokenizer to add one")
    except DataError as error:
        say(f"no tokenizer is written: {error}; give --tokenizer to add one")
    return None


@app.command("from-hf", epilog=examples("galvatron convert from-hf openai-community/gpt2 models/gpt2"))
def from_hf(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory or hub name, in any format.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new directory.")],
) -> None:
    """Bring a model into the form that jobs read by slices ([model] weights = true): safetensors by current names.

    A directory or hub model that has such files already needs no conversion.
    """
    check_folder(out, "OUT", new=True)
    from galvatron.models import auto_class, load_config

    config = load_config(model)
    try:
        loaded = auto_class(config).from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{model} has no weights that load ({reason}); give a directory or hub name") from None
    with new_folder(out) as folder:
        loaded.save_pretrained(folder)
    say(f"wrote {out} from {model}")
