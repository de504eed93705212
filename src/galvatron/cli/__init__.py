"""The command line: one file a verb, wiring the deciding half and the doing half together.

Takes arguments and a job file; gives the files of a run directory and what people read.  A GalvatronError is
one sentence on standard error and exit code 2.  Nothing heavy is imported before a verb needs it.
"""

from __future__ import annotations

import sys

import typer

from . import convert, import_, plan, profile, run, search, train
from .console import rank
from .launch import WorkerCrash
from .mistakes import as_mistake

INTERRUPTED = 130  # the exit code of a process that SIGINT ended

app = typer.Typer(
    name="galvatron",
    help="Automatic distributed training for Transformers: profile, search the fastest plan that fits, train with it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
for verb in (profile, convert, plan, import_):
    app.add_typer(verb.app)
for command in (search, train, run):
    command.register(app)


def main() -> None:
    """Run the command line and exit: 0 done, 1 a crash, 2 a mistake the user can mend, 130 interrupted."""
    try:
        app()
    except WorkerCrash as crash:
        _fail(f"galvatron: {crash}", 1)
    except KeyboardInterrupt:
        _fail("galvatron: interrupted", INTERRUPTED)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer says nothing of a Ctrl-C within a verb
            _fail("galvatron: interrupted", INTERRUPTED)
        raise
    except Exception as error:
        mistake = as_mistake(error)
        if mistake is None:
            raise
        _fail(f"galvatron: {mistake}", 2)


def _fail(message: str, code: int) -> None:
    if rank() == 0:
        print(message, file=sys.stderr)
    sys.exit(code)
