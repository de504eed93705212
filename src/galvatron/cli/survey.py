"""``galvatron models survey``: every type of transformers, checked one by one, as a table.

Takes names of types; gives verdicts, a line each in a file that a survey goes on from, and a page of documentation.
Types are foreign code: each is checked in a forked process, with limits of time and memory.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from galvatron.core.errors import ConfigError
from galvatron.core.files import check_output, write_output
from galvatron.core.parsing import parse_json, read_text
from galvatron.core.records import validate
from galvatron.core.words import shown

from .console import say

if TYPE_CHECKING:
    from galvatron.parallelize.verdict import Verdict

LIMIT_S, CPU_S, MEMORY_BYTES = 1200, 60, 8 << 30  # [Assumed] a twin takes a second or two and some 100 MiB
WORKS, BY_HEADS = "every strategy", "data, pipeline and tensor parallelism"


def survey(
    types: Annotated[
        list[str] | None, typer.Argument(metavar="[TYPE...]", help="Types of models; all of transformers if left out.")
    ] = None,
    results: Annotated[
        Path, typer.Option("--results", help="A line a type; what it holds is not checked again.")
    ] = Path("types.jsonl"),
    out: Annotated[Path | None, typer.Option("--out", help="The page to write, as docs/types.md.")] = None,
) -> None:
    """Check every type of model that transformers has for galvatron's tasks, and write a page of what works."""
    check_output(results, option="--results")
    if out is not None:
        check_output(out, results)
    import transformers

    from galvatron.models import types_of_tasks

    wanted = types or types_of_tasks()
    if unknown := set(wanted) - set(types_of_tasks()):
        raise ConfigError(f"transformers has no task for the type {shown(min(unknown))}; choose another")
    known = {v.model_type: v for v in _read(results) if v.transformers == transformers.__version__}
    waiting = [name for name in wanted if name not in known]
    with results.open("a", encoding="utf-8") as lines:
        for verdict in _verdicts(waiting, transformers.__version__):
            lines.write(json.dumps(verdict.model_dump(exclude_defaults=True)) + "\n")
            lines.flush()
            known[verdict.model_type] = verdict
            detail = f" ({verdict.detail})" if verdict.detail else ""
            say(f"{len(known)}/{len(wanted)}  {verdict.model_type}: {_outcome(verdict)}{detail}")
    found = [known[name] for name in wanted]
    if out is not None:
        write_output(out, page(found, len(types_of_tasks())))
    say(f"{len(found)} types: " + ", ".join(f"{count} {name}" for name, count in _counts(found).items()))


def _read(results: Path) -> Iterator[Verdict]:
    from galvatron.parallelize.verdict import Verdict

    for number, line in enumerate(read_text(results, ConfigError).splitlines() if results.is_file() else (), 1):
        source = f"{results}, line {number}"
        yield validate(Verdict, parse_json(line, source, ConfigError, "delete the line"), source, ConfigError)


@dataclass
class _Check:
    """A type that is being checked in a process of its own."""

    model_type: str
    process: Any
    connection: Connection
    start: float = field(default_factory=time.monotonic)


def _verdicts(types: list[str], version: str) -> Iterator[Verdict]:
    """Verdicts as they come; as many types at once as there are cores."""
    from galvatron.parallelize.verdict import Verdict

    context, waiting = multiprocessing.get_context("fork"), list(reversed(types))
    running: list[_Check] = []
    try:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                running.append(_started(context, waiting.pop(), version))
            wait([check.connection for check in running], timeout=1.0)
            for check in list(running):
                is_late = time.monotonic() - check.start > LIMIT_S
                if not (check.connection.poll() or is_late):
                    continue
                running.remove(check)
                yield _answer(check) or Verdict(
                    model_type=check.model_type, why=_ending(check, is_late), refused=True, transformers=version
                )
    finally:
        for check in running:
            check.process.kill()


def _started(context: Any, model_type: str, version: str) -> _Check:
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_judge, args=(there, model_type, version), daemon=True)
    process.start()
    there.close()
    return _Check(model_type, process, here)


def _answer(check: _Check) -> Verdict | None:
    """What a process said, if it came to that."""
    try:
        verdict: Verdict | None = check.connection.recv() if check.connection.poll() else None
    except EOFError:
        verdict = None
    check.process.kill()
    check.process.join()
    check.connection.close()
    return verdict


def _ending(check: _Check, is_late: bool) -> str:
    """Why a process gave no answer."""
    if is_late or check.process.exitcode == -signal.SIGXCPU:
        return f"takes more than {CPU_S} s of a core"
    return "ends its process"


def _judge(connection: Connection, model_type: str, version: str) -> None:
    import torch

    from galvatron.parallelize.verdict import judge

    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    spent = int(time.process_time()) + CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (spent, spent + 1))
    torch.set_num_threads(1)
    connection.send(judge(model_type, version))


def _outcome(verdict: Verdict) -> str:
    if verdict.refused:
        return f"refused: {verdict.why}"
    return WORKS if not verdict.lacks else f"no {', '.join(verdict.lacks)}: {verdict.why}"


def _counts(verdicts: list[Verdict]) -> dict[str, int]:
    kinds = Counter(_kind(verdict) for verdict in verdicts)
    return {name: kinds[name] for name in (f"with {WORKS}", f"with {BY_HEADS}", "with fewer", "refused")}


def _kind(verdict: Verdict) -> str:
    if verdict.refused:
        return "refused"
    if not verdict.lacks:
        return f"with {WORKS}"
    return "with fewer" if {"pp", "tp"} & set(verdict.lacks) else f"with {BY_HEADS}"


def page(verdicts: list[Verdict], total: int) -> str:
    """The page of documentation: types by what can be done to them, and why; of ``total`` that there are."""
    by_outcome: dict[str, list[str]] = defaultdict(list)
    for verdict in verdicts:
        by_outcome[_outcome(verdict)].append(verdict.model_type)
    rows = sorted(by_outcome.items(), key=lambda row: (row[0] != WORKS, row[0].startswith("refused"), -len(row[1])))
    counts = ", ".join(f"{count} {name}" for name, count in _counts(verdicts).items())
    lines = [
        "# Types of models",
        "",
        f"What `galvatron models survey` finds of {len(verdicts)} of the {total} types of transformers "
        f"{verdicts[0].transformers} that have a model for one of galvatron's tasks: {counts}.",
        "A tiny twin of each type's own config decides, for the task that the type is known for: losses and all",
        "gradients, in as many stages as layers and between two tensor-parallel ranks, with two heads of keys and",
        "values and with one.  `galvatron models check TYPE` says of one type what was found wrong.",
        "",
        "| strategies | types |",
        "| --- | --- |",
        *(f"| {outcome.replace('|', '/')} | {', '.join(sorted(types))} |" for outcome, types in rows),
    ]
    return "\n".join(lines) + "\n"
