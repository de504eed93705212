"""The replayed pipeline as a picture: text for terminals, SVG for pages.

Takes the events of a ``cost.Replay``; gives a string.  Forwards and backwards carry their microbatch's number.
"""

from __future__ import annotations

from collections.abc import Sequence

from galvatron.core.units import format_seconds
from galvatron.cost.pipeline import Event

FORWARD_COLOUR, BACKWARD_COLOUR = "#4c78a8", "#f58518"
ROW_HEIGHT, LABEL_WIDTH = 24, 60


def draw_text(events: Sequence[Event], step_time_s: float, width: int = 100) -> str:
    """One line a stage, ``width`` columns for the step: forwards as digits, backwards as letters, waiting as dots.

    Microbatch i is the digit i mod 10 going forward and the i-th letter (mod 26) coming back.
    """
    scale = width / step_time_s
    rows: dict[int, list[str]] = {}
    for event in events:
        row = rows.setdefault(event.stage, ["."] * width)
        first = min(int(event.start_s * scale), width - 1)
        last = max(int(event.end_s * scale), first + 1)
        mark = str(event.microbatch % 10) if event.kind == "forward" else chr(ord("a") + event.microbatch % 26)
        row[first:last] = [mark] * (min(last, width) - first)
    lines = [f"stage {stage}  {''.join(row)}" for stage, row in sorted(rows.items())]
    return "\n".join(
        [*lines, f"0-9 forward, a-z backward, . waiting or after the pipeline; {format_seconds(step_time_s)}"]
    )


def draw_svg(events: Sequence[Event], step_time_s: float, width: int = 1000) -> str:
    """The same as an SVG document: one row a stage, one titled rectangle an event."""
    scale = width / step_time_s
    stages = max(event.stage for event in events) + 1
    boxes = [_label(stage) for stage in range(stages)] + [_box(event, scale) for event in events]
    size = f'width="{width + LABEL_WIDTH}" height="{stages * ROW_HEIGHT}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-size="11">', *boxes, "</svg>"]) + "\n"


def _label(stage: int) -> str:
    return f'<text x="0" y="{stage * ROW_HEIGHT + 16}">stage {stage}</text>'


def _box(event: Event, scale: float) -> str:
    colour = FORWARD_COLOUR if event.kind == "forward" else BACKWARD_COLOUR
    x, length = LABEL_WIDTH + event.start_s * scale, (event.end_s - event.start_s) * scale
    took = format_seconds(event.end_s - event.start_s)
    return (
        f'<rect x="{x:.2f}" y="{event.stage * ROW_HEIGHT + 2}" width="{length:.2f}" height="{ROW_HEIGHT - 4}" '
        f'fill="{colour}" stroke="white" stroke-width="0.5"><title>{event.kind} of microbatch {event.microbatch}: '
        f"{took}</title></rect>"
    )
