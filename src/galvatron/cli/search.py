"""``galvatron search``: the fastest plan that fits; needs no torch and no devices.

Takes a model, a cluster and limits; gives ``plan.json`` and its explanation.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Annotated

import typer

from galvatron.core.errors import InfeasibleError, OutputError
from galvatron.core.files import check_output, is_special, write_output
from galvatron.core.hardware import HardwareProfile
from galvatron.core.job import Job, SearchSection
from galvatron.core.lora import Lora
from galvatron.core.model import Precision, ReduceDtype
from galvatron.core.model_profile import ModelProfile
from galvatron.core.units import parse_seconds

from .console import console, error_console, say
from .inputs import Cluster, Model, batch_sizes, fraction, memory_limit
from .options import LoraSettings, TaskName, examples

if TYPE_CHECKING:
    from galvatron.cost import Runtime
    from galvatron.plan import Plan
    from galvatron.search import Change, Limits, SearchResult
    from galvatron.search.sensitivity import SearchAgain

MAX_ROWS, MAX_COLUMNS = 32, 100  # stages and columns of a pipeline that is printed
LABEL_COLUMNS = len("  stage 99  ")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        epilog=examples(
            "galvatron search --model model.json --cluster hardware.json --memory 36GiB --global-batch-size 64",
            "galvatron search --model llama3.1-405b --cluster h100:2048x8 --seq-len 8192 --global-batch-size 2048",
            "galvatron search --model llama2-7b --cluster rtx4090:1x8 --seq-len 4096 --global-batch-size 64-512",
            "galvatron search --model mixtral-8x7b --cluster h100:4x8 --link inter=25GB/s --seq-len 4096"
            " --global-batch-size 256 --space all --fix pp=4 --max tp=8 --what-if",
            "galvatron search --model llama2-7b --cluster a100:1x8 --seq-len 4096 --global-batch-size 64 --json",
            "galvatron search --model llama3.1-8b --cluster rtx4090:1x2 --seq-len 4096 --global-batch-size 8"
            " --lora r=16",
            "galvatron search --model deepseek-v3 --cluster h100:128x8 --seq-len 4096 --global-batch-size 1024"
            " --space all --time-limit 30s --gap 1%",
        )
    )(search)


def search(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="CARD|CONFIG.json|model.json",
            help="A published model's name, a Hugging Face config.json, or a profile.",
        ),
    ],
    cluster: Annotated[
        str,
        typer.Option(
            "--cluster",
            "--hardware",
            metavar="PRESET:NODESxDEVICES|hardware.json",
            help="Devices by name, such as h100:16x8, or a profile.",
        ),
    ],
    global_batch_size: Annotated[
        str,
        typer.Option(
            "--global-batch-size", metavar="N|N-N|N,N", help="Sequences a step; of several the fastest is chosen."
        ),
    ],
    link: Annotated[
        list[str] | None,
        typer.Option(
            "--link",
            metavar="LINK=RATE",
            help="Override a preset's link: inter=50GB/s, intra=, inter_latency=5us. Repeatable.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Limit a device: 36GiB, 36G or 80GB; all it has if left out."),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", min=1, help="Tokens a sequence; a profile's own if left out.")
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option("--precision", help="The precision layers compute in; a profile's own, else bf16."),
    ] = None,
    grad_reduce_dtype: Annotated[
        ReduceDtype, typer.Option("--grad-reduce-dtype", help="What gradients are summed in.")
    ] = "fp32",
    space: Annotated[
        str,
        typer.Option(
            "--space",
            metavar="runtime|all|hetu|dp|fsdp|tp|pp|3d|uniform",
            help="runtime: what can be trained; all: also moments in host memory; hetu: what Hetu-Galvatron can be "
            "told; or one of the simple plans.",
        ),
    ] = "runtime",
    fix: Annotated[
        list[str] | None,
        typer.Option("--fix", metavar="NAME=VALUE", help="Fix a dimension, such as pp=4 or head.tp=8. Repeatable."),
    ] = None,
    forbid: Annotated[
        list[str] | None,
        typer.Option("--forbid", metavar="NAME", help="Leave something out, such as ulysses. Repeatable."),
    ] = None,
    at_most: Annotated[
        list[str] | None, typer.Option("--max", metavar="NAME=N", help="Bound a dimension, such as tp=8. Repeatable.")
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="Compare with simple plans and endless memory.")
    ] = True,
    what_if: Annotated[
        bool, typer.Option("--what-if", help="Search again with more memory, network and nodes: what would help.")
    ] = False,
    gap: Annotated[
        str, typer.Option("--gap", metavar="PERCENT", help="Stop when the plan is proved within this of the best: 1%.")
    ] = "0%",
    time_limit: Annotated[
        str | None,
        typer.Option("--time-limit", metavar="TIME", help="Stop with the best plan so far after 30s, 5m or 1h."),
    ] = None,
    lora: LoraSettings = None,
    task: TaskName = None,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("plan.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Find the fastest plan that fits in memory, layer by layer, and explain it.

    Exact over its space: the plan carries a lower bound that no plan of the space beats.  Names of models and devices
    stand for estimated profiles; files for measured ones.  A picture of the predicted step goes beside the plan
    (plan.svg).  Ctrl-C or the time limit ends the search with the best plan so far and its gap.
    """
    from galvatron.search import Limits, sensitivity

    picture = picture_beside(out, model, cluster)
    limits = Limits.parse(space, fix or (), forbid or (), at_most or ())
    within, seconds = fraction(gap), None if time_limit is None else parse_seconds(time_limit)
    batches, where = batch_sizes(global_batch_size), Cluster.of(cluster, link or [])
    limit = memory_limit(memory, where.hardware)
    adapters = None if lora is None else Lora.parse(lora)
    what = Model(model, seq_len, precision, _tp_asked(limits), adapters, task)
    profile = what.profile(where.hardware)
    with error_console().status("searching", spinner="line") as status:
        job = _Search(what, batches, grad_reduce_dtype, limits, within, seconds, lambda line: status.update(line))
        try:
            result = job.find(profile, where.hardware, limit, baselines=baselines)
        except InfeasibleError as error:
            raise _with_remedy(error, job.again, where, limit) from None
        changes: Sequence[Change] = ()
        if what_if and not result.stopped:
            with contextlib.suppress(KeyboardInterrupt):  # the plan is there already
                changes = sensitivity(job.again, where.hardware, result.memory_limit_bytes, where.shape)
    result.plan.save(out)
    if as_json:
        from galvatron.report import summary

        typer.echo(json.dumps(summary(result, changes), indent=2, allow_nan=False))  # ASCII: for any pipe
    else:
        show(result, changes)
        draw(result.plan, profile, where.hardware, picture, limits.runtime)
        say(f"wrote {out}")


def _tp_asked(limits: Limits) -> int:
    """The largest tp that the limits name."""
    named = [*limits.fix.items(), *limits.at_most.items()]
    return max((v for name, v in named if name.rpartition(".")[2] == "tp" and isinstance(v, int)), default=1)


@dataclass(frozen=True)
class _Search:
    """One search with everything fixed but the cluster and its memory."""

    model: Model
    batch_sizes: list[int]
    grad_reduce_dtype: ReduceDtype
    limits: Limits
    gap: float
    time_limit_s: float | None
    progress: Callable[[str], None]

    def find(
        self,
        profile: ModelProfile,
        hardware: HardwareProfile,
        memory_limit_bytes: int | None,
        *,
        num_candidates: int = 8,
        baselines: bool = True,
    ) -> SearchResult:
        """The search."""
        from galvatron.search import search as find

        return find(
            profile,
            hardware,
            global_batch_size=self.batch_sizes,
            seq_len=self.model.seq_len,
            precision=self.model.precision,
            grad_reduce_dtype=self.grad_reduce_dtype,
            memory_limit_bytes=memory_limit_bytes,
            limits=self.limits,
            num_candidates=num_candidates,
            baselines=baselines,
            gap=self.gap,
            time_limit_s=self.time_limit_s,
            progress=self.progress,
        )

    def again(self, hardware: HardwareProfile, memory_limit_bytes: int) -> SearchResult:
        """The same on another cluster, for its best plan alone."""
        profile = self.model.profile(hardware)
        return self.find(profile, hardware, memory_limit_bytes, num_candidates=1, baselines=False)


def _with_remedy(error: InfeasibleError, again: SearchAgain, where: Cluster, limit: int | None) -> InfeasibleError:
    """The same with how many of these nodes would do, where a preset can tell."""
    from galvatron.search import what_would_fit

    if where.shape is None or not error.constraint.startswith("memory"):
        return error
    enough = what_would_fit(again, limit or where.hardware.device.memory_bytes, where.shape)
    found = f"{enough} would do" if enough else "16 times the nodes would not do"
    return InfeasibleError(f"{error}; {found}", constraint=error.constraint)


def search_for_job(job: Job, model: ModelProfile, hardware: HardwareProfile) -> SearchResult:
    """The search that a job asks for."""
    from galvatron.search import search as find

    train = job.train
    return find(
        model,
        hardware,
        global_batch_size=train.global_batch_size,
        seq_len=train.seq_len,
        precision=train.precision,
        grad_reduce_dtype=train.grad_reduce_dtype,
        memory_limit_bytes=memory_limit(job.search.memory, hardware),
        limits=limits_of(job.search),
    )


def limits_of(section: SearchSection) -> Limits:
    """The job file's limits, within what the runtime can run."""
    from galvatron.search import Limits

    fixed = {"pp": section.pp, "num_microbatches": section.num_microbatches}
    return Limits(
        fix={name: value for name, value in fixed.items() if value is not None},
        at_most={} if section.max_tp is None else {"tp": section.max_tp},
    )


def show(result: SearchResult, changes: Sequence[Change] = ()) -> None:
    """The plan and why it was chosen."""
    from galvatron.report import explain

    say(explain(result, changes))


def picture_beside(out: Path, *inputs: str) -> Path | None:
    """Where the picture of the plan at ``out`` goes; None beside what is no file.  Raises OutputError."""
    check_output(out, *inputs)
    picture = out.with_suffix(".svg")
    if picture == out:
        raise OutputError(f"--out {out} is where the plan's picture goes; name the plan {out.with_suffix('.json')}")
    if is_special(out):
        return None
    check_output(picture, *inputs, option="the picture beside --out")
    return picture


def draw(
    plan: Plan, model: ModelProfile, hardware: HardwareProfile, path: Path | None, runtime: Runtime = "galvatron"
) -> None:
    """Write the plan's replayed step as a picture, and print it where a pipeline makes it worth looking at."""
    from galvatron.cost import replay
    from galvatron.report import draw_svg, draw_text

    replayed = replay(plan, model, hardware, runtime)
    step_time_s = replayed.step_time_s if replayed.is_partial else None
    if path is not None:
        write_output(path, draw_svg(replayed.events, replayed.shown_s, step_time_s=step_time_s))
    if 1 < plan.pp <= MAX_ROWS:
        say(f"\nPipeline (predicted{f'; {path} is a picture of it' if path else ''})")
        width = min(MAX_COLUMNS, console().width - LABEL_COLUMNS)
        say(indent(draw_text(replayed.events, replayed.shown_s, width, step_time_s=step_time_s), "  "))


def runner_up(result: SearchResult) -> Plan | None:
    """The fastest other candidate with another pipeline or other layer strategies; None if there is none."""
    chosen = result.plan
    others = (
        c for c in result.candidates if (c.layers_per_stage, c.layers) != (chosen.layers_per_stage, chosen.layers)
    )
    return next(others, None)
