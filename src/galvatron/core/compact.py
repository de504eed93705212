"""JSON to read and to compare: in lines that fit a page, with every object of a list on a line of its own."""

from __future__ import annotations

import json
from typing import Any

WIDTH = 120
BEGINNING = 40
"""Room that the first words of a list of objects want on a line."""


def compact(data: dict[str, Any]) -> str:
    """``data`` as text with a trailing newline; its objects and lists begin a line each, and what would not fit."""
    lines = ["{"]
    for at, (key, value) in enumerate(data.items()):
        head = f"{json.dumps(key)}: "
        if at and (isinstance(value, (dict, list)) or len(lines[-1] + head + _text(value)) + 2 > WIDTH):
            lines.append(" ")
        elif at:
            lines[-1] += " "
        _add(lines, head, value, indent=1, follow=1)
        lines[-1] += "," if at < len(data) - 1 else "}"
    return "\n".join(lines) + "\n"


def _add(lines: list[str], head: str, value: Any, indent: int, follow: int) -> None:
    """Add ``value`` behind ``head`` to the last of ``lines``, and to further ones of ``indent`` where it is too long.

    ``follow``: how many characters will come after it.
    """
    text = _text(value)
    lines[-1] += head
    if len(lines[-1] + text) + follow <= WIDTH or not isinstance(value, (dict, list)):
        lines[-1] += text
        return
    lines[-1] += text[0]
    items = list(value.items()) if isinstance(value, dict) else [("", item) for item in value]
    are_short = all(len(lines[-1] + _text(item)) + follow < WIDTH for _, item in items)
    inner = len(lines[-1]) if _has_rows(value) and are_short else indent + 1
    for at, (key, item) in enumerate(items):
        own, after = f"{json.dumps(key)}: " if key else "", follow + 1 if at == len(items) - 1 else 1
        size = 1 + len(own + _text(item)) + after
        opens = _has_rows(item) and inner + size > WIDTH and len(lines[-1] + own) + BEGINNING <= WIDTH
        is_apart = (len(items) > 1 or indent > 1) if _has_rows(value) else len(lines[-1]) + size > WIDTH and not opens
        if is_apart and (at or inner == indent + 1):
            lines.append(" " * inner)
        elif at:
            lines[-1] += " "
        _add(lines, own, item, inner, after)
        lines[-1] += "," if at < len(items) - 1 else text[-1]


def _has_rows(value: Any) -> bool:
    """Whether it is a list of objects."""
    return isinstance(value, list) and isinstance(next(iter(value), None), dict)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
