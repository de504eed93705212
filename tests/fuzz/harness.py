"""Every mutation ends in one clear sentence or in a right result, within its time, and damages nothing.

Takes a Kind and a number; gives how many were refused and accepted, and raises at the first that ended otherwise.
"""

from __future__ import annotations

import random
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from galvatron.core.errors import GalvatronError

SEED = 20261126
LIMIT_CPU_S = 20.0
"""Of the processor, so that a busy machine makes nothing of it."""
MORE_MEMORY_BYTES = 6 * 2**30
MAX_SENTENCE = 1500
ABSURD = re.compile(
    r"(?<![\w.])-\d[\d.,]* ?(?:B|[KMGTP]iB|s|ms|µs|TFLOP/s|(?:sample|token)s/s)\b|\b(?:nan|inf)\b", re.IGNORECASE
)


@dataclass(frozen=True)
class Kind:
    """``mutate`` damages a file of ``good`` (in a fresh folder copied from it); ``use`` does what users do with it.

    ``use`` raises GalvatronError to refuse, AssertionError where the result is wrong.
    """

    name: str
    good: Path
    mutate: Callable[[Path, random.Random], None]
    use: Callable[[Path], None]


@dataclass
class Outcome:
    """How many mutations ended how."""

    refused: int = 0
    accepted: int = 0


class _Hang(BaseException):
    """No Exception, so that no handler takes it for a defect of the file."""


def run(kind: Kind, count: int, folder: Path, first: int = 0) -> Outcome:
    """Mutations ``first`` to ``first + count`` of ``kind``, each from its own seed."""
    outcome = Outcome()
    with _less_memory():
        for i in range(first, first + count):
            work = folder / "work"
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(kind.good, work)
            kind.mutate(work, random.Random(f"{SEED}-{kind.name}-{i}"))
            before = _bytes_of(work)
            try:
                with _cpu_limit():
                    kind.use(work)
                outcome.accepted += 1
            except GalvatronError as error:
                outcome.refused += 1
                check_sentence(str(error), f"{kind.name} {i}")
            except BaseException as error:
                error.add_note(f"mutation {i} of {kind.name}, left in {work}")
                raise
            assert _bytes_of(work, before) == before, f"mutation {i} of {kind.name} changed its own files"
    return outcome


def check_sentence(text: str, where: str) -> None:
    """One line for people."""
    assert text.isprintable(), f"{where}: not one printable line: {text!r}"
    assert 10 < len(text) <= MAX_SENTENCE, f"{where}: {len(text)} characters: {text}"


def check_words(text: str) -> None:
    """What is printed of an accepted file holds no negative sizes, no nan and no inf."""
    found = ABSURD.search(text)
    assert found is None, f"absurd: {found and found[0]} in {text}"


def _bytes_of(folder: Path, only: dict[str, bytes] | None = None) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if only is None or name in only}


@contextmanager
def _cpu_limit() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise _Hang(f"over {LIMIT_CPU_S} s of processor time")

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _less_memory() -> Iterator[None]:
    """A file that asks for endless memory is an error here, not the end of the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE_MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
