"""The replayed pipeline as a picture: text for terminals, SVG for pages.

Takes the events of a ``cost.Replay``; gives a string.  Passes carry their microbatch's number; later chunks of a stage
are lighter.
"""

from __future__ import annotations

from collections.abc import Sequence

from galvatron.core.units import counted, format_seconds
from galvatron.cost.pipeline import Event

COLOURS = {"forward": "#4c78a8", "backward": "#f58518", "weight": "#54a24b"}
KINDS = {"forward": "forward", "backward": "backward", "weight": "weight gradients"}
WAITING_COLOUR = "#eceff1"
LIGHTEST = 0.55  # how far the last chunk's shade is on the way to white
ROW_HEIGHT, LABEL_WIDTH, HEADER_HEIGHT, AXIS_HEIGHT, MARGIN = 26, 64, 30, 24, 12
CHARACTER_WIDTH = 7  # of a digit at the font size below
NUM_TICKS = 5


def draw_text(events: Sequence[Event], shown_s: float, width: int = 100, *, step_time_s: float | None = None) -> str:
    """One line a stage, ``width`` columns for ``shown_s`` seconds; dots where a stage waits.

    Microbatch i is the digit i mod 10 going forward, the i-th letter (mod 26) coming back, and that letter as a capital
    where gradients of parameters have a pass of their own.  ``step_time_s``: of the whole step, where the events are
    its first microbatches alone.
    """
    scale = width / shown_s
    rows: dict[int, list[str]] = {}
    for event in events:
        row = rows.setdefault(event.stage, ["."] * width)
        first = min(int(event.start_s * scale), width - 1)
        last = max(int(event.end_s * scale), first + 1)
        row[first:last] = [_mark(event)] * (min(last, width) - first)
    digits = len(str(max(rows)))
    lines = [f"stage {stage:>{digits}}  {''.join(row)}" for stage, row in sorted(rows.items())]
    weights = ", A-Z weight gradients" if any(event.kind == "weight" for event in events) else ""
    after = "" if step_time_s is not None else " or after the pipeline"
    legend = f"0-9 forward, a-z backward{weights}, . waiting{after}; {_title(events, shown_s, step_time_s)}"
    return "\n".join([*lines, legend])


def _mark(event: Event) -> str:
    if event.kind == "forward":
        return str(event.microbatch % 10)
    return chr(ord("a" if event.kind == "backward" else "A") + event.microbatch % 26)


def _title(events: Sequence[Event], shown_s: float, step_time_s: float | None) -> str:
    if step_time_s is None:
        return format_seconds(shown_s)
    count = max(event.microbatch for event in events) + 1
    return f"only the first {counted(count, 'microbatch')}, {format_seconds(shown_s)} of {format_seconds(step_time_s)}"


def draw_svg(events: Sequence[Event], shown_s: float, width: int = 1000, *, step_time_s: float | None = None) -> str:
    """The same as an SVG document: a row a stage, a titled box an event, a legend above and seconds below."""
    scale = width / shown_s
    stages, chunks = (max(getattr(event, name) for event in events) + 1 for name in ("stage", "chunk"))
    bottom = HEADER_HEIGHT + stages * ROW_HEIGHT
    size = f'width="{LABEL_WIDTH + width + 2 * MARGIN}" height="{bottom + AXIS_HEIGHT}"'
    body = [
        _legend(events, chunks, _title(events, shown_s, step_time_s)),
        *(_row(stage, width) for stage in range(stages)),
        *(_box(event, scale, chunks) for event in events),
        *(_tick(shown_s * i / NUM_TICKS, scale, bottom) for i in range(NUM_TICKS + 1)),
    ]
    style = 'font-family="sans-serif" font-size="12" style="background: white"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', *body, "</svg>"]) + "\n"


def _colour(kind: str, chunk: int, chunks: int) -> str:
    """The kind's colour, the lighter the later the chunk."""
    base, light = COLOURS[kind], LIGHTEST * chunk / max(chunks - 1, 1)
    channels = (int(base[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(channel + light * (255 - channel)):02x}" for channel in channels)


def _legend(events: Sequence[Event], chunks: int, title: str) -> str:
    used = [kind for kind in KINDS if any(event.kind == kind for event in events)]
    swatches = [(KINDS[kind], [_colour(kind, chunk, chunks) for chunk in range(chunks)]) for kind in used]
    parts, x = [f'<text x="{LABEL_WIDTH}" y="19" font-weight="bold">one step, {title}</text>'], LABEL_WIDTH + 100
    x += CHARACTER_WIDTH * len(title)
    for name, colours in [*swatches, ("waiting or after", [WAITING_COLOUR])]:
        for colour in colours:
            parts.append(f'<circle cx="{x}" cy="15" r="6" fill="{colour}"/>')
            x += 13
        words = f"{name}, first to last chunk" if len(colours) > 1 else name
        parts.append(f'<text x="{x - 2}" y="19">{words}</text>')
        x += CHARACTER_WIDTH * len(words) + 22
    return "".join(parts)


def _row(stage: int, width: int) -> str:
    y = HEADER_HEIGHT + stage * ROW_HEIGHT
    band = f'<path d="M{LABEL_WIDTH} {y + 2}h{width}v{ROW_HEIGHT - 4}h-{width}z" fill="{WAITING_COLOUR}"/>'
    return f'<text x="{MARGIN}" y="{y + 17}">stage {stage}</text>{band}'


def _box(event: Event, scale: float, chunks: int) -> str:
    x, length = LABEL_WIDTH + event.start_s * scale, (event.end_s - event.start_s) * scale
    y = HEADER_HEIGHT + event.stage * ROW_HEIGHT
    took, number = format_seconds(event.end_s - event.start_s), str(event.microbatch)
    of_chunk = f", chunk {event.chunk}" if chunks > 1 else ""
    label = ""
    if length > CHARACTER_WIDTH * (len(number) + 1):
        label = f'<text x="{x + length / 2:.2f}" y="{y + 17}" fill="white" text-anchor="middle">{number}</text>'
    colour = _colour(event.kind, event.chunk, chunks)
    title = f"<title>{KINDS[event.kind]} of microbatch {number}{of_chunk}: {took}</title>"
    return (
        f'<rect x="{x:.2f}" y="{y + 2}" width="{length:.2f}" height="{ROW_HEIGHT - 4}" fill="{colour}" stroke="white" '
        f'stroke-width="0.5">{title}</rect>{label}'
    )


def _tick(time_s: float, scale: float, y: int) -> str:
    x = LABEL_WIDTH + time_s * scale
    line = f'<path d="M{x:.2f} {y}v5" stroke="#546e7a"/>'
    return f'{line}<text x="{x:.2f}" y="{y + 18}" fill="#546e7a" text-anchor="middle">{format_seconds(time_s)}</text>'
