"""``galvatron plan``: look at plans, compare them, and move them to and from other systems.

Takes plan files; gives text, another system's file or ``plan.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from galvatron.core.errors import PlanError
from galvatron.core.files import check_output, write_output
from galvatron.core.records import read_text

from .console import say
from .options import Precision, examples

if TYPE_CHECKING:
    from galvatron.plan import Plan

app = typer.Typer(name="plan", help="Show, compare, import and export plans.", no_args_is_help=True)
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN.json", help="A plan file.")]


@app.command("show", epilog=examples("galvatron plan show plan.json"))
def show(path: PlanFile) -> None:
    """Show a plan, and what it promises where it carries a prediction."""
    plan = _sound(path)
    say(plan.describe())
    if plan.prediction is not None:
        from galvatron.report import explain_prediction

        say(f"\n{explain_prediction(plan)}")


@app.command("diff", epilog=examples("galvatron plan diff plan.json other.json"))
def diff(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="A plan file.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Another plan file.")],
) -> None:
    """Say what differs between two plans, layer by layer."""
    from galvatron.report.diff import diff_plans

    say(diff_plans(_sound(first), _sound(second)))


@app.command(
    "export",
    epilog=examples(
        "galvatron plan export plan.json --format megatron",
        "galvatron plan export plan.json --format torchtitan --out parallelism.toml",
    ),
)
def export(
    path: PlanFile,
    format: Annotated[Literal["hetu", "torchtitan", "megatron"], typer.Option("--format", help="Whose format.")],
    out: Annotated[Path | None, typer.Option("--out", help="The file to write; printed if left out.")] = None,
) -> None:
    """Write a plan as Hetu-Galvatron's plan file, torchtitan's configuration or Megatron-LM's arguments.

    A plan that the system cannot run is refused, never changed.
    """
    if out is not None:
        check_output(out, path)
    text = _exported(_sound(path), format)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_output(out, text)
        say(f"wrote {out}")


def _sound(path: Path) -> Plan:
    """The plan in a file, if it obeys the rules that need no model."""
    from galvatron.plan import Plan

    plan = Plan.load(path)
    plan.validate()
    return plan


def _exported(plan: Plan, format: str) -> str:
    from galvatron.exchange import export_plan, to_megatron, to_torchtitan

    if format == "hetu":
        return export_plan(plan)
    if format == "torchtitan":
        return to_torchtitan(plan)
    import shlex

    return shlex.join(to_megatron(plan)) + "\n"


@app.command(
    "import",
    epilog=examples(
        "galvatron plan import galvatron_config.json --format hetu --world-size 8 --seq-len 2048 --out plan.json"
    ),
)
def import_(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Another system's plan file.")],
    world_size: Annotated[int, typer.Option("--world-size", min=1, help="Devices that the plan is for.")],
    seq_len: Annotated[int, typer.Option("--seq-len", min=1, help="Tokens a sequence.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write.")],
    format: Annotated[Literal["hetu"], typer.Option("--format", help="Whose format.")] = "hetu",
    model: Annotated[
        str | None,
        typer.Option("--model", help="Check it against this model: a card, config.json or model.json."),
    ] = None,
    precision: Precision = "bf16",
) -> None:
    """Bring in a plan that Hetu-Galvatron found; it is checked by all rules that plans obey here."""
    from galvatron.exchange import import_plan, named_spec

    check_output(out, path, *([] if model is None else [model]))
    spec = None if model is None else named_spec(model)
    text = read_text(path, PlanError)
    plan = import_plan(text, world_size, seq_len, spec, precision, model=path.stem, source=str(path))
    plan.save(out)
    say(plan.describe())
    say(f"wrote {out}")
