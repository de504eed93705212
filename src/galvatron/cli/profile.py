"""``galvatron profile hardware|model``: measure, and write ``hardware.json`` or ``model.json``.

Takes a model's name and a number of processes; gives profile files.  Knows nothing of plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from galvatron.core.files import check_output
from galvatron.core.lora import Lora
from galvatron.core.tasks import Task

from .console import say
from .launch import Processes, processes
from .options import Compile, Device, LoraSettings, Nproc, Precision, examples

if TYPE_CHECKING:
    from galvatron.core.model import Precision as PrecisionName
    from galvatron.parallelize.processes.world import World

app = typer.Typer(name="profile", help="Measure this cluster or a model on it.", no_args_is_help=True)


@dataclass(frozen=True)
class ModelRequest:
    """Which model to measure, at which sequence length and precision, with which parameters frozen.

    ``compiled``: whether its layers are; None leaves that to the device.  ``fp8``: whether their products are.
    ``lora``: adapters in its layers.  ``task``, ``num_labels``: in place of what its config says.
    """

    path: str
    seq_len: int
    precision: PrecisionName
    freeze: tuple[str, ...] = ()
    compiled: bool | None = None
    fp8: bool = False
    lora: Lora | None = None
    task: Task | None = None
    num_labels: int | None = None

    def config(self) -> Any:
        """The model's configuration."""
        from galvatron.models import load_config

        return load_config(self.path, self.task, self.num_labels)


@dataclass(frozen=True)
class Measurement:
    """What to measure in one start of the processes, and where to write it; None leaves that half out."""

    hardware_out: Path | None = None
    model_out: Path | None = None
    model: ModelRequest | None = None


@app.command(
    epilog=examples(
        "galvatron profile hardware --nproc 4", "torchrun --nproc-per-node 8 --no-python galvatron profile hardware"
    )
)
def hardware(
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("hardware.json"),
    nproc: Nproc = None,
    device: Device = "auto",
) -> None:
    """Measure devices, links and overlap of a world of processes.

    Every collective is timed over every group of ranks that a plan for this world can use.
    """
    check_output(out)
    with processes(nproc, device) as ranks:
        measure(ranks, Measurement(hardware_out=out))
    say(f"wrote {out}")


@app.command(
    epilog=examples(
        "galvatron profile model meta-llama/Llama-3.2-1B --seq-len 2048 --precision bf16",
        "galvatron profile model examples/quickstart_model/config.json --seq-len 128 --nproc 4",
    )
)
def model(
    path: Annotated[str, typer.Argument(metavar="MODEL", help="A config.json, a local directory or a hub name.")],
    seq_len: Annotated[int, typer.Option("--seq-len", min=1, help="Tokens a sequence in training.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("model.json"),
    freeze: Annotated[
        list[str] | None,
        typer.Option("--freeze", help="Parameters that are not trained, by name or pattern; may be repeated."),
    ] = None,
    precision: Precision = "fp32",
    nproc: Nproc = None,
    device: Device = "auto",
    compile: Compile = None,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="Make products of layers in float8, as in training (with --precision bf16).")
    ] = False,
    lora: LoraSettings = None,
) -> None:
    """Measure a model's layers at every tensor-cut shape a plan for this many processes can ask for.

    Weights are never loaded: only the config is read.
    """
    check_output(out, path)
    with processes(nproc, device) as ranks:
        adapters = None if lora is None else Lora.parse(lora)
        request = ModelRequest(path, seq_len, precision, tuple(freeze or ()), compile, fp8, adapters)
        measure(ranks, Measurement(model_out=out, model=request))
    say(f"wrote {out}")


def measure(ranks: Processes, measurement: Measurement) -> None:
    """Start (or join) processes and write the profiles that ``measurement`` asks for."""
    if measurement.model is not None:
        from galvatron.models import build_spec

        # an unsupported model, or a pattern that matches nothing, fails here, before any process starts
        request = measurement.model
        build_spec(request.config(), freeze=request.freeze, lora=request.lora)
    ranks.run(_measure, measurement)


def _measure(world: World, measurement: Measurement) -> None:
    """One rank's part."""
    from galvatron.profile import profile_hardware, profile_model

    if measurement.hardware_out is not None:
        profile = profile_hardware(world, progress=_line)
        if world.rank == 0:
            profile.save(measurement.hardware_out)
    if measurement.model is not None and measurement.model_out is not None:
        request = measurement.model
        measured = profile_model(
            request.config(),
            world,
            seq_len=request.seq_len,
            precision=request.precision,
            freeze=request.freeze,
            compile=request.compiled,
            fp8=request.fp8,
            lora=request.lora,
            progress=_line,
        )
        if world.rank == 0:
            measured.save(measurement.model_out)


def _line(text: str) -> None:
    say(f"  {text}")
