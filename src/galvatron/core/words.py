"""Words that people type: what they may have meant, and how to show what they gave.

Takes words and those that are known; gives phrases for messages.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

SHOWN_CHARACTERS = 60
"""As much of a value or of a name as a message shows."""


def plain(word: str) -> str:
    """Letters and digits alone, in lower case: what ``H100-SXM`` and ``h100 sxm`` have in common."""
    return re.sub(r"[^a-z0-9]", "", word.lower())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What joins a complaint to its remedy: ``; did you mean 'lr'? ``, or a mere semicolon where none is near."""
    names = {plain(name): name for name in known}
    near = difflib.get_close_matches(plain(word)[:SHOWN_CHARACTERS], names, n=1, cutoff=0.76)
    return f"; did you mean {names[near[0]]!r}? " if near else "; "


def printable(text: str) -> str:
    """``text`` on one line: what no terminal shows is written as Python writes it."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def shown(value: object) -> str:
    """A value as Python writes it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes out
        return "a number of thousands of digits"
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
