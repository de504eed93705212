"""``galvatron import``: profiles that another system measured.

Takes its files; gives ``model.json`` and ``hardware.json``, written once all files have been read and found sound.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from galvatron.core.files import check_folder, check_output
from galvatron.core.units import parse_bytes

from .console import say
from .options import examples

app = typer.Typer(name="import", help="Bring in profiles that another system measured.", no_args_is_help=True)

OUTPUTS = ("model.json", "hardware.json")


@app.callback()
def _group() -> None:
    """Keep the name of the system a word of its own, though there is only one yet."""


@app.command(
    "hetu",
    epilog=examples(
        "galvatron import hetu --computation computation_profiling_bf16_llama2-7b_all.json"
        " --memory memory_profiling_bf16_llama2-7b_all.json --hardware hardware --out profiles"
    ),
)
def hetu(
    computation: Annotated[Path, typer.Option("--computation", help="A computation_profiling file.")],
    memory: Annotated[Path, typer.Option("--memory", help="A memory_profiling file.")],
    hardware: Annotated[Path, typer.Option("--hardware", help="The folder of bandwidth and overlap files.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write model.json and hardware.json into.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="The measured model: a card, config.json or model.json; the file name's."),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", min=1, help="Tokens a sequence, where several were measured.")
    ] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="Nodes of the world; 1 if measured.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", min=1, help="Devices of a node; 8 if measured.")
    ] = None,
    device_memory: Annotated[str, typer.Option("--device-memory", help="Memory of an A100: 40GB or 80GB.")] = "40GB",
) -> None:
    """Import Hetu-Galvatron's profiles of a model and of A100 nodes.

    Says what its files do not hold and was taken from elsewhere.
    """
    from galvatron.exchange import card_of_file, import_hardware, import_model, named_spec

    check_folder(out)
    for name in OUTPUTS:
        check_output(out / name, computation, memory)
    device_memory_bytes = parse_bytes(device_memory)
    spec = named_spec(model or card_of_file(computation))
    model_profile = import_model(computation, memory, spec, seq_len)
    hardware_profile, notes = import_hardware(hardware, nodes, gpus_per_node, device_memory_bytes)
    for name, profile in zip(OUTPUTS, (model_profile, hardware_profile), strict=True):
        profile.save(out / name)
    say("backward times, tp above 1 and all of embedding's time are Hetu-Galvatron's assumptions, not measured")
    for note in notes:
        say(note)
    say(f"wrote {' and '.join(str(out / name) for name in OUTPUTS)}")
