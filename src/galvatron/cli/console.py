"""What people see: one rich console per process, silent on every rank but 0.

Takes strings and tables; gives lines on standard output, and progress on standard error.  Lines are wrapped to the
terminal, and at ``PIPED_WIDTH`` where there is none; what an encoding lacks is spelled in ASCII.  Knows nothing of
plans or processes beyond ``RANK``.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import sys
from functools import cache
from textwrap import TextWrapper

from rich.console import Console

PIPED_WIDTH = 120
"""Columns of what goes into a file or a pipe, unless COLUMNS says otherwise."""
SPELLED = {"µ": "u", "×": "x", "→": "->", "…": "...", "─": "-", "✓": "ok", "–": "-", "’": "'", "“": '"', "”": '"'}
"""How symbols look where the encoding of a stream lacks them; anything else is escaped."""
_BEFORE_UNIT = re.compile(r"(?<=\d) (?=[A-Za-zµ])")  # where a line is not broken: 4.1 GiB


def rank() -> int:
    """This process's rank in the world torchrun or ``launch`` made; 0 outside of one."""
    return int(os.environ.get("RANK", "0"))


@cache
def console() -> Console:
    """The process's console; ``highlight`` off, so that numbers look the same in a terminal and in a log."""
    return _console()


@cache
def error_console() -> Console:
    """The same on standard error, for what must not mix with a result on standard output."""
    return _console(stderr=True)


def _console(*, stderr: bool = False) -> Console:
    plain_symbols()
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return Console(highlight=False, soft_wrap=True, quiet=rank() != 0, stderr=stderr, width=width)


def plain_symbols() -> None:
    """Let standard output and error spell what their encoding lacks, instead of failing at it."""
    codecs.register_error("spelled", _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="spelled")


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    escaped = (SPELLED.get(symbol) or symbol.encode("ascii", "backslashreplace").decode() for symbol in lacking)
    return "".join(escaped), error.end


def heading(text: str) -> None:
    """A titled rule between the phases of a run."""
    console().rule(f"[bold]{text}", align="left", style="dim")


def say(text: str = "") -> None:
    """One line or block of plain text (brackets are text, not markup), wrapped at the width of the console."""
    console().print(wrapped(text, console().width), markup=False)


def wrapped(text: str, width: int) -> str:
    """``text`` with its lines broken between words; a broken line goes on four columns further in than it began."""
    return "\n".join(_wrapped_line(line, width) for line in text.split("\n"))


def _wrapped_line(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    indent = line[: len(line) - len(line.lstrip())]
    wrapper = TextWrapper(
        width, subsequent_indent=indent + "    ", break_long_words=False, break_on_hyphens=False, expand_tabs=False
    )
    return wrapper.fill(_BEFORE_UNIT.sub("\xa0", line)).replace("\xa0", " ")
