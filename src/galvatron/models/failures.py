"""What went wrong where foreign models are built and run, in a line."""

from __future__ import annotations

from galvatron.core.errors import GalvatronError

MAX_MESSAGE = 200


def said(failure: Exception) -> str:
    """The kind of an error and its message; of one that galvatron's own code made, where, for that says nothing else.

    Sentences of galvatron's are told as they are.
    """
    lines = str(failure).strip().splitlines()
    if isinstance(failure, GalvatronError):
        return lines[0]
    module = _module(failure)
    if module.startswith("galvatron."):
        return f"{type(failure).__name__} in {module}, which knows no such model"
    return f"{type(failure).__name__} ({lines[0][:MAX_MESSAGE] if lines else 'no message'})"


def _module(failure: Exception) -> str:
    """Which module's code raised it."""
    trace, name = failure.__traceback__, ""
    while trace is not None:
        name, trace = str(trace.tb_frame.f_globals.get("__name__", "")), trace.tb_next
    return name
