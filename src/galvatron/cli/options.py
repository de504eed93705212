"""Options that several verbs share, so that they read the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from galvatron.core import model, tasks

Nproc = Annotated[
    int | None,
    typer.Option("--nproc", min=1, help="Local processes to start; leave out under torchrun or srun."),
]
Device = Annotated[Literal["cpu", "cuda", "auto"], typer.Option("--device", help="Where to run.")]
Precision = Annotated[model.Precision, typer.Option("--precision", help="The precision layers compute in.")]
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="Whether layers are compiled, as in training; by default on CUDA."),
]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Run directory; runs/<job file stem> if left out.")]
Validation = Annotated[
    str | None, typer.Option("--validation", help="A source to evaluate on, in place of the job's data.validation.")
]
LoraSettings = Annotated[
    str | None,
    typer.Option(
        "--lora",
        metavar="r=16,lora_alpha=32,…",
        help="Train LoRA adapters alone, by peft's names: target_modules=q_proj+v_proj (all-linear if left out), "
        "lora_dropout=0.05, use_rslora=true.",
    ),
]
TaskName = Annotated[
    tasks.Task | None, typer.Option("--task", help="What to train the model for, in place of what its config says.")
]
JobFile = Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file.")]


def examples(*lines: str) -> str:
    """An epilog of example commands; ``\\b`` keeps their line breaks."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
