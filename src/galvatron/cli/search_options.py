"""What a search can be told, an option each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from galvatron.core import model

ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="CARD|CONFIG.json|model.json",
        help="A published model's name, a Hugging Face config.json, or a profile.",
    ),
]
ClusterName = Annotated[
    str,
    typer.Option(
        "--cluster",
        "--hardware",
        metavar="PRESET:NODESxDEVICES|hardware.json",
        help="Devices by name, such as h100:16x8, or a profile.",
    ),
]
BatchSizes = Annotated[
    str,
    typer.Option(
        "--global-batch-size", metavar="N|N-N|N,N", help="Sequences a step; of several the fastest is chosen."
    ),
]
Links = Annotated[
    list[str] | None,
    typer.Option(
        "--link",
        metavar="LINK=RATE",
        help="Override a preset's link: inter=50GB/s, intra=, inter_latency=5us. Repeatable.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="Limit a device: 36GiB, 36G or 80GB; all it has if left out."),
]
SeqLen = Annotated[int | None, typer.Option("--seq-len", min=1, help="Tokens a sequence; a profile's own if left out.")]
Precision = Annotated[
    model.Precision | None,
    typer.Option("--precision", help="The precision layers compute in; a profile's own, else bf16."),
]
ReduceDtype = Annotated[model.ReduceDtype, typer.Option("--grad-reduce-dtype", help="What gradients are summed in.")]
SpaceName = Annotated[
    str,
    typer.Option(
        "--space",
        metavar="runtime|all|hetu|dp|fsdp|tp|pp|3d|uniform",
        help="runtime: what can be trained; all: also moments in host memory; hetu: what Hetu-Galvatron can be "
        "told; or one of the simple plans.",
    ),
]
Fix = Annotated[
    list[str] | None,
    typer.Option("--fix", metavar="NAME=VALUE", help="Fix a dimension, such as pp=4 or head.tp=8. Repeatable."),
]
Forbid = Annotated[
    list[str] | None,
    typer.Option("--forbid", metavar="NAME", help="Leave something out, such as ulysses. Repeatable."),
]
AtMost = Annotated[
    list[str] | None, typer.Option("--max", metavar="NAME=N", help="Bound a dimension, such as tp=8. Repeatable.")
]
Baselines = Annotated[
    bool, typer.Option("--baselines/--no-baselines", help="Compare with simple plans and endless memory.")
]
WhatIf = Annotated[
    bool, typer.Option("--what-if", help="Search again with more memory, network and nodes: what would help.")
]
Gap = Annotated[
    str, typer.Option("--gap", metavar="PERCENT", help="Stop when the plan is proved within this of the best: 1%.")
]
TimeLimit = Annotated[
    str | None,
    typer.Option("--time-limit", metavar="TIME", help="Stop with the best plan so far after 30s, 5m or 1h."),
]
CapacityFactor = Annotated[
    float | None,
    typer.Option("--capacity-factor", min=1e-3, help="What an expert takes of an even load; all if left out."),
]
Out = Annotated[Path, typer.Option("--out", help="The file to write.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
