"""``galvatron search``: the fastest plan that fits, from two profiles; needs no torch and no devices.

Takes profile files and limits; gives ``plan.json`` and its explanation.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from galvatron.core.hardware import HardwareProfile
from galvatron.core.job import Job
from galvatron.core.model import ModelProfile
from galvatron.core.records import write_atomic
from galvatron.core.units import parse_bytes

from .console import console, say
from .options import examples

if TYPE_CHECKING:
    from galvatron.plan import Plan
    from galvatron.search import SearchResult


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        epilog=examples(
            "galvatron search --model model.json --hardware hardware.json --memory 36GiB --global-batch-size 64",
            "galvatron search --model model.json --hardware hardware.json --global-batch-size 64 --pp 2 --json",
        )
    )(search)


def search(
    model: Annotated[Path, typer.Option("--model", help="The model's profile.")],
    hardware: Annotated[Path, typer.Option("--hardware", help="The cluster's profile.")],
    global_batch_size: Annotated[int, typer.Option("--global-batch-size", min=1, help="Sequences a step.")],
    memory: Annotated[
        str | None, typer.Option("--memory", help="Limit a device, such as 36GiB; its own memory if left out.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option("--seq-len", min=1, help="Tokens a sequence; the profile's.")] = None,
    grad_reduce_dtype: Annotated[
        Literal["fp32", "bf16"], typer.Option("--grad-reduce-dtype", help="What gradients are summed in.")
    ] = "fp32",
    pp: Annotated[int | None, typer.Option("--pp", min=1, help="Fix the number of pipeline stages.")] = None,
    num_microbatches: Annotated[
        int | None, typer.Option("--num-microbatches", min=1, help="Fix the number of microbatches.")
    ] = None,
    max_tp: Annotated[int | None, typer.Option("--max-tp", min=1, help="The largest tp to consider.")] = None,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("plan.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON and nothing else.")] = False,
) -> None:
    """Find the fastest plan that fits in memory, layer by layer, and explain it.

    Exact over its space: the plan carries a lower bound that no plan of the space beats.  A picture of the predicted
    step goes beside the plan (plan.svg).
    """
    from galvatron.search import search as find

    model_profile, hardware_profile = ModelProfile.load(model), HardwareProfile.load(hardware)
    with console().status("searching") as status:
        result = find(
            model_profile,
            hardware_profile,
            global_batch_size=global_batch_size,
            seq_len=seq_len,
            memory_limit_bytes=None if memory is None else parse_bytes(memory),
            grad_reduce_dtype=grad_reduce_dtype,
            pp=pp,
            num_microbatches=num_microbatches,
            max_tp=max_tp,
            progress=lambda line: status.update(line),
        )
    result.plan.save(out)
    if as_json:
        typer.echo(result.plan.to_json(), nl=False)
    else:
        show(result)
        draw(result.plan, model_profile, hardware_profile, out.with_suffix(".svg"))
        say(f"wrote {out}")


def search_for_job(job: Job, model: ModelProfile, hardware: HardwareProfile) -> SearchResult:
    """The search that a job asks for."""
    from galvatron.search import search as find

    limits, train = job.search, job.train
    return find(
        model,
        hardware,
        global_batch_size=train.global_batch_size,
        seq_len=train.seq_len,
        precision=train.precision,
        grad_reduce_dtype=train.grad_reduce_dtype,
        memory_limit_bytes=limits.memory_bytes,
        pp=limits.pp,
        num_microbatches=limits.num_microbatches,
        max_tp=limits.max_tp,
    )


def show(result: SearchResult) -> None:
    """The plan and why it was chosen."""
    from galvatron.report.why import explain

    say(explain(result))


def draw(plan: Plan, model: ModelProfile, hardware: HardwareProfile, path: Path) -> None:
    """Write the plan's replayed step as a picture, and print it where a pipeline makes it worth looking at."""
    from galvatron.cost import replay
    from galvatron.report.timeline import draw_svg, draw_text

    replayed = replay(plan, model, hardware)
    write_atomic(path, draw_svg(replayed.events, replayed.step_time_s))
    if plan.pp > 1:
        say(f"\nPipeline (predicted; {path} is a picture of it)")
        say(indent(draw_text(replayed.events, replayed.step_time_s), "  "))


def runner_up(result: SearchResult) -> Plan | None:
    """The fastest other candidate with another pipeline or other layer strategies; None if there is none."""
    chosen = result.plan
    others = (
        c for c in result.candidates if (c.layers_per_stage, c.layers) != (chosen.layers_per_stage, chosen.layers)
    )
    return next(others, None)
