"""``galvatron data prepare``: tokenise a job's text into its run directory, before any device is taken.

Takes a job; gives the file of tokens that ``train`` and ``run`` would make first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from galvatron.core.job import DataSection, Job
from galvatron.core.tasks import Task
from galvatron.core.units import counted

from .console import console, error_console, say
from .launch import processes
from .options import JobFile, RunDir, Validation, examples
from .rundir import RunDirectory

if TYPE_CHECKING:
    from galvatron.train import Dataset
    from galvatron.train.text import Skipped
    from galvatron.train.tokens import Progress

app = typer.Typer(name="data", help="Tokenise a job's text.", no_args_is_help=True)

LINE_EVERY_S = 10.0
"""Between lines of progress where there is no terminal to show it live."""


@app.callback()
def _only() -> None:
    """One verb so far, which keeps its name."""


@app.command(epilog=examples("galvatron data prepare job.toml", "galvatron data prepare job.toml --run-dir runs/first"))
def prepare(job: JobFile, run_dir: RunDir = None, validation: Validation = None) -> None:
    """Tokenise a job's text into its run directory; train and run then begin at once.

    What was cut off goes on with the same command.  Needs one process and no GPU.
    """
    from galvatron.models import task_of

    loaded, run = Job.load(job).validated_on(validation), RunDirectory.of_job(job, run_dir)
    with processes(1, "cpu") as ranks, ranks.locked(run.path):
        config = config_of_job(loaded)
        paths = ranks.on_main(lambda: prepare_data(loaded, run, task_of(config)))
        ranks.here(lambda: read_data(loaded, run, config))
    for path in paths:
        say(f"{path} is ready")


def config_of_job(job: Job) -> Any:
    """The configuration of the job's model, for its task."""
    from galvatron.models import load_config

    return load_config(job.model.path, job.model.task, job.model.num_labels)


def prepare_data(job: Job, run: RunDirectory, task: Task) -> list[Path]:
    """What ``job`` and its validation read, checked, and tokenised unless it is already; one process only."""
    return [_prepare(data, job, run, task) for data in (job.data, job.data.of_validation) if data is not None]


def read_data(job: Job, run: RunDirectory, config: Any) -> Dataset:
    """The dataset of ``job`` for the model of ``config``, and what was left out of it said."""
    from galvatron.train import load_dataset

    dataset = load_dataset(job.data, job.train, run.path, config=config)
    for data, made in ((job.data, dataset), (job.data.of_validation, dataset.validation)):
        if data is not None and made is not None:
            say_skipped(made.skipped, data)
    return dataset


def _prepare(data: DataSection, job: Job, run: RunDirectory, task: Task) -> Path:
    from galvatron.train import prepare_source
    from galvatron.train.text import Skipped

    skipped = Skipped(data.skip_bad_records)
    with _progress(data.source) as progress:
        path = prepare_source(data, job.train, run.path, task=task, progress=progress, skipped=skipped)
    say_skipped(skipped, data)
    return path


def say_skipped(skipped: Skipped, data: DataSection) -> None:
    """Say what was left out of ``data``, if anything."""
    if skipped.count:
        say(f"{counted(skipped.count, 'bad record')} of {data.source} left out, the first: {skipped.first}")


@contextmanager
def _progress(source: str) -> Iterator[Progress]:
    """Tokens so far and how fast they come: live in a terminal, else a line now and then."""
    status = error_console().status(f"tokenising {source}")
    first: tuple[float, int] | None = None
    said_s = time.monotonic()

    def show(num_tokens: int) -> None:
        nonlocal first, said_s
        now = time.monotonic()
        first = first or (now, num_tokens)
        rate = (num_tokens - first[1]) / max(now - first[0], 1e-3)
        text = f"tokenising {source}: {num_tokens:,} tokens" + (f", {rate:,.0f}/s" if rate else "")
        status.update(text)
        if not console().is_terminal and now - said_s > LINE_EVERY_S:
            said_s = now
            say(text)

    with status:
        yield show
