"""What is wrong with a file's values, all of it, in one sentence.

Takes pydantic's ValidationError; gives text that names every key, what was expected there and what was given.
"""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from .words import did_you_mean, printable, shown

MAX_SHOWN = 8
"""Defects that a sentence names; the rest are counted."""
MAX_REASON = 300  # characters of one
WORDS = {
    r"^Value error, ": "",
    r"^Field required$": "must be given",
    r"^\w+ should have at (least|most) (\d+) items? after validation, not (\S+)$": r"must have \2 at \1, has \3",
    r"^Input should be a valid (dictionary|object).*$": "must be an object",
    r"^Input should be a valid (tuple|list|array)$": "must be a list",
    r"^(Input|String) should ": "must ",
    r"\bgreater than or equal to\b": "at least",
    r"\bless than or equal to\b": "at most",
}
"""Patterns of pydantic's sentences, and what stands for each."""


def sentence(cls: type[BaseModel], failure: ValidationError) -> str:
    """Every defect as ``where: reason (got value)``, unknown keys first: they explain what is missing."""
    errors = failure.errors(include_url=False, include_context=False)
    errors.sort(key=lambda error: error["type"] != "extra_forbidden")
    known = {error["loc"]: known_keys(cls, error["loc"]) for error in errors if error["type"] == "extra_forbidden"}
    defects = list(dict.fromkeys(_defect(error["loc"], error, known.get(error["loc"])) for error in errors))
    more = [f"and {len(defects) - MAX_SHOWN} more"] if len(defects) > MAX_SHOWN else []
    return "; ".join([*defects[:MAX_SHOWN], *more])


def _defect(loc: tuple[int | str, ...], error: Any, known: list[str] | None) -> str:
    where = ".".join(map(_name, loc)) or "the file"
    if known is not None:
        choices = f"known here: {', '.join(known)}" if known else "remove it"
        return f"{where}: unknown key{did_you_mean(str(loc[-1]), known)}{choices}"
    reason = printable(_in_our_words(error["msg"]))
    reason = reason if len(reason) <= MAX_REASON else f"{reason[: MAX_REASON - 3]}..."
    got = "" if isinstance(error["input"], (dict, list, tuple)) else f" (got {shown(error['input'])})"
    return f"{where}: {reason}{got}"


def _in_our_words(message: str) -> str:
    """What pydantic says, as the project says it."""
    for pattern, words in WORDS.items():
        message = re.sub(pattern, words, message)
    return message


def _name(part: int | str) -> str:
    text = str(part)
    return text if re.fullmatch(r"[\w\[\]@ -]{1,60}", text) else shown(text)


def known_keys(cls: Any, loc: tuple[int | str, ...]) -> list[str]:
    """The keys that belong where ``loc`` points, sorted; none where there is no record."""
    model = cls
    for part in loc[:-1]:
        fields = getattr(model, "model_fields", {})
        model = _record_in(fields[part].annotation) if part in fields else model if isinstance(part, int) else None
    return sorted(getattr(model, "model_fields", {}))


def _record_in(annotation: Any) -> Any:
    """The record that an annotation is, or holds: ``Record | None``, ``tuple[Record, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_record_in(argument) for argument in get_args(annotation))
    return next((record for record in found if record is not None), None)
