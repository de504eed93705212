"""A plan's predicted step as a picture: in a file beside the plan, and on the console."""

from __future__ import annotations

from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING

from galvatron.core.errors import OutputError
from galvatron.core.files import check_output, is_special, write_output
from galvatron.core.hardware import HardwareProfile
from galvatron.core.model_profile import ModelProfile

from .console import console, say

if TYPE_CHECKING:
    from galvatron.cost import Runtime
    from galvatron.plan import Plan

MAX_ROWS, MAX_COLUMNS = 32, 100  # stages and columns of a pipeline that is printed
LABEL_COLUMNS = len("  stage 99  ")


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
