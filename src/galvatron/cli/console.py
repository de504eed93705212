"""What people see: one rich console per process, silent on every rank but 0.

Takes strings and tables; gives lines on standard output, and progress on standard error.  Knows nothing of plans or
processes beyond ``RANK``.
"""

from __future__ import annotations

import os
from functools import cache

from rich.console import Console


def rank() -> int:
    """This process's rank in the world torchrun or ``launch`` made; 0 outside of one."""
    return int(os.environ.get("RANK", "0"))


@cache
def console() -> Console:
    """The process's console; ``highlight`` off, so that numbers look the same in a terminal and in a log."""
    return Console(highlight=False, soft_wrap=True, quiet=rank() != 0)


@cache
def error_console() -> Console:
    """The same on standard error, for what must not mix with a result on standard output."""
    return Console(highlight=False, soft_wrap=True, quiet=rank() != 0, stderr=True)


def heading(text: str) -> None:
    """A titled rule between the phases of a run."""
    console().rule(f"[bold]{text}", align="left", style="dim")


def say(text: str = "") -> None:
    """One line or block of plain text (brackets are text, not markup)."""
    console().print(text, markup=False)
