"""What went wrong where foreign models are built and run, in a line."""

from __future__ import annotations

import traceback

from galvatron.core.errors import GalvatronError

MAX_MESSAGE = 200


def said(failure: Exception) -> str:
    """The kind of an error and its message; of one that galvatron's own code made, where, for that says nothing else.

    Sentences of galvatron's are told as they are.
    """
    lines = str(failure).strip().splitlines()
    if isinstance(failure, GalvatronError):
        return lines[0]
    if _modules(failure)[-1:] == _ours(failure)[-1:] != []:
        return where(failure)
    return f"{type(failure).__name__} ({lines[0][:MAX_MESSAGE] if lines else 'no message'})"


def where(failure: Exception) -> str:
    """The kind of an error, and where in galvatron's code it came up."""
    return f"{type(failure).__name__} in {_ours(failure)[-1]}, which knows no such model"


def _ours(failure: Exception) -> list[str]:
    return [name for name in _modules(failure) if name.startswith("galvatron.")]


def _modules(failure: Exception) -> list[str]:
    """Whose code called whose, down to what raised it."""
    frames = (frame for frame, _ in traceback.walk_tb(failure.__traceback__))
    return [str(frame.f_globals.get("__name__", "")) for frame in frames]
