"""The command line: one file a verb, wiring the deciding half and the doing half together.

Takes arguments and a job file; gives the files of a run directory and what people read.  A GalvatronError is
one sentence on standard error and exit code 2.  Nothing heavy is imported before a verb needs it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Annotated

import typer

from galvatron.core.errors import WorldError
from galvatron.core.version import __version__

from . import checkpoint, convert, data, import_, models, plan, profile, run, search, train
from .console import plain_symbols, rank
from .launch import is_joined
from .mistakes import as_mistake
from .workers import WorkerCrash

ENDINGS = {
    128 + signal.SIGINT: "interrupted",
    128 + signal.SIGTERM: "terminated",
    128 + signal.SIGHUP: "ended, its terminal hung up",
}
"""Exit codes of a signal, as a shell gives them, in words."""


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"galvatron {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="galvatron",
    help="Automatic distributed training for Transformers: profile, search the fastest plan that fits, train with it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (profile, data, checkpoint, convert, plan, import_, models):
    app.add_typer(verb.app)
for command in (search, train, run):
    command.register(app)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """What stands before a verb."""


def main() -> None:
    """Run the command line and exit: 0 done, 1 a crash, 2 a mistake the user can mend, 128 + a signal."""
    plain_symbols()
    try:
        with _signals_exit():
            app()
    except WorkerCrash as crash:
        _fail(f"galvatron: {crash}", 1)
    except KeyboardInterrupt:
        _fail("galvatron: interrupted", 128 + signal.SIGINT)
    except SystemExit as stop:
        if stop.code in ENDINGS:
            _fail(f"galvatron: {ENDINGS[stop.code]}", stop.code)
        raise
    except Exception as error:
        mistake = as_mistake(error)
        if mistake is None:
            raise
        _fail(f"galvatron: {mistake}", 2, every_rank=isinstance(mistake, WorldError))


@contextmanager
def _signals_exit() -> Iterator[None]:
    """SIGTERM and SIGHUP leave as Ctrl-C does, through every ``finally``; ignored (nohup) they stay so.

    Not in a joined world: a rank that waits in a collective would not hear, and its launcher ends it by SIGTERM.
    """

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    numbers = () if is_joined(os.environ) else (signal.SIGTERM, signal.SIGHUP)
    asking = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in asking:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in asking:
            signal.signal(number, signal.SIG_DFL)


def _fail(message: str, code: int, *, every_rank: bool = False) -> None:
    if rank() == 0 or every_rank:
        with suppress(OSError):  # a terminal that is gone
            print(message, file=sys.stderr)
    sys.exit(code)
