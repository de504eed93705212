"""Processes that measure: a crash, a hang or a full device ends one of them, and what it has sent stays.

Takes functions of this package; gives what they send.  Children are forked from a server that has imported torch and
does nothing else (``galvatron.testing.pool`` does the same); where that has touched CUDA, which survives no fork, they
are spawned instead and import it themselves.  Knows nothing of what is measured.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, Self

from galvatron.testing.pool import PRELOAD

Row = dict[str, Any]
Start = Literal["forkserver", "spawn"]
GRACE_S = 15.0
"""How long a child may go on after its seconds are over: it looks at the clock between two rows."""


class CutShortError(Exception):
    """A part ended before its last row; the message says why."""


@dataclass(frozen=True)
class Clock:
    """When seconds are over; all processes of a machine agree on it."""

    end: float

    @classmethod
    def of(cls, seconds: float) -> Self:
        return cls(time.monotonic() + seconds)

    @property
    def left_s(self) -> float:
        return self.end - time.monotonic()


@dataclass(frozen=True)
class _Failure:
    reason: str


class Child:
    """A process that runs ``fn(connection, *args)``; whatever it sends is a row, None the end."""

    def __init__(self, fn: Callable[..., None], *args: Any, start: Start = "forkserver") -> None:
        context: Any = multiprocessing.get_context(start)
        if start == "forkserver":
            context.set_forkserver_preload(list(PRELOAD))
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, fn, args))
        self._process.start()
        theirs.close()

    def rows(self, clock: Clock) -> Iterator[Row]:
        """What it sends until it ends; raises CutShortError where it fails or its seconds are long over."""
        while (row := self.receive(clock.left_s + GRACE_S)) is not None:
            yield row

    def fileno(self) -> int:
        return self._ours.fileno()

    def send(self, message: Any) -> None:
        try:
            self._ours.send(message)
        except OSError:
            raise CutShortError("the process has ended") from None

    def receive(self, seconds: float) -> Row | None:
        if not self._ours.poll(max(seconds, 0.0)):
            self.close()
            raise CutShortError("no answer in time")
        try:
            message = self._ours.recv()
        except (EOFError, ConnectionError):
            raise CutShortError("the process ended without an answer") from None
        if isinstance(message, _Failure):
            raise CutShortError(message.reason)
        return message  # type: ignore[no-any-return]

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.join()
        self._ours.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def rows_of_all(children: Collection[Child], clock: Clock) -> Iterator[Row]:
    """What several send, in the order of its coming; one that fails ends alone: its reason is a row's ``failed``."""
    running = set(children)
    while running:
        ready = wait(running, max(clock.left_s + GRACE_S, 0.0))
        for child in ready or list(running):
            assert isinstance(child, Child)
            try:
                row = child.receive(0.0)
            except CutShortError as cut:
                row = {"failed": str(cut)}
            if row is None or "failed" in row:
                running.remove(child)
            if row is not None:
                yield row


def reason_of(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:200] if lines else type(error).__name__


def _serve(connection: Connection, fn: Callable[..., None], args: tuple[Any, ...]) -> None:
    message: _Failure | None = None
    try:
        fn(connection, *args)
    except BaseException as error:  # whatever it was, the caller hears of it
        message = _Failure(reason_of(error))
    connection.send(message)
