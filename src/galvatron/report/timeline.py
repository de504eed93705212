"""The replayed pipeline as a picture: text for terminals, SVG for pages.

Takes the events of a ``cost.Replay``; gives a string.  Forwards and backwards carry their microbatch's number.
"""

from __future__ import annotations

from collections.abc import Sequence

from galvatron.core.units import format_seconds
from galvatron.cost.pipeline import Event

FORWARD_COLOUR, BACKWARD_COLOUR, WAITING_COLOUR = "#4c78a8", "#f58518", "#eceff1"
ROW_HEIGHT, LABEL_WIDTH, HEADER_HEIGHT, AXIS_HEIGHT, MARGIN = 26, 64, 30, 24, 12
CHARACTER_WIDTH = 7  # of a digit at the font size below
NUM_TICKS = 5


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
    """The same as an SVG document: a row a stage, a titled box an event, a legend above and seconds below."""
    scale = width / step_time_s
    stages = max(event.stage for event in events) + 1
    bottom = HEADER_HEIGHT + stages * ROW_HEIGHT
    size = f'width="{LABEL_WIDTH + width + 2 * MARGIN}" height="{bottom + AXIS_HEIGHT}"'
    body = [
        _legend(step_time_s),
        *(_row(stage, width) for stage in range(stages)),
        *(_box(event, scale) for event in events),
        *(_tick(step_time_s * i / NUM_TICKS, scale, bottom) for i in range(NUM_TICKS + 1)),
    ]
    style = 'font-family="sans-serif" font-size="12" style="background: white"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', *body, "</svg>"]) + "\n"


def _legend(step_time_s: float) -> str:
    swatches = [("forward", FORWARD_COLOUR), ("backward", BACKWARD_COLOUR), ("waiting or after", WAITING_COLOUR)]
    parts = [f'<text x="{LABEL_WIDTH}" y="19" font-weight="bold">one step, {format_seconds(step_time_s)}</text>']
    for i, (name, colour) in enumerate(swatches):
        x = LABEL_WIDTH + 150 + 110 * i
        parts.append(f'<circle cx="{x}" cy="15" r="6" fill="{colour}"/><text x="{x + 11}" y="19">{name}</text>')
    return "".join(parts)


def _row(stage: int, width: int) -> str:
    y = HEADER_HEIGHT + stage * ROW_HEIGHT
    band = f'<path d="M{LABEL_WIDTH} {y + 2}h{width}v{ROW_HEIGHT - 4}h-{width}z" fill="{WAITING_COLOUR}"/>'
    return f'<text x="{MARGIN}" y="{y + 17}">stage {stage}</text>{band}'


def _box(event: Event, scale: float) -> str:
    colour = FORWARD_COLOUR if event.kind == "forward" else BACKWARD_COLOUR
    x, length = LABEL_WIDTH + event.start_s * scale, (event.end_s - event.start_s) * scale
    y = HEADER_HEIGHT + event.stage * ROW_HEIGHT
    took, number = format_seconds(event.end_s - event.start_s), str(event.microbatch)
    label = ""
    if length > CHARACTER_WIDTH * (len(number) + 1):
        label = f'<text x="{x + length / 2:.2f}" y="{y + 17}" fill="white" text-anchor="middle">{number}</text>'
    return (
        f'<rect x="{x:.2f}" y="{y + 2}" width="{length:.2f}" height="{ROW_HEIGHT - 4}" fill="{colour}" stroke="white" '
        f'stroke-width="0.5"><title>{event.kind} of microbatch {number}: {took}</title></rect>{label}'
    )


def _tick(time_s: float, scale: float, y: int) -> str:
    x = LABEL_WIDTH + time_s * scale
    line = f'<path d="M{x:.2f} {y}v5" stroke="#546e7a"/>'
    return f'{line}<text x="{x:.2f}" y="{y + 18}" fill="#546e7a" text-anchor="middle">{format_seconds(time_s)}</text>'
