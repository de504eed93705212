"""Local ranks: processes on this machine that work together, and that never outlive what started them.

Takes a module-level function ``work(world, argument)``; gives rank 0's result.  A GalvatronError of any rank comes back
as that one sentence, a crash as the first rank's traceback, a killed rank as its signal.  A signal to this process asks
the ranks to stop (they save and end), a second one ends them.  Knows nothing of what the work is.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from galvatron.core.errors import GalvatronError

from .mistakes import as_mistake

if TYPE_CHECKING:
    from galvatron.parallelize.processes.world import World

DeviceName = Literal["cpu", "cuda", "auto"]
A = TypeVar("A")
R = TypeVar("R")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 2.0
"""How long the other ranks may take to report after the first failure, before they are ended."""
END_S = 5.0
"""How long ranks that are done may take to end."""
WATCH_S = 0.5
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class WorkerCrash(Exception):
    """A rank failed with something that is not the user's mistake; the message says which and how."""


@dataclass(frozen=True)
class _Task:
    """What every rank of one start is told."""

    world_size: int
    device: DeviceName
    store: str
    parent: int
    num_threads: int
    work: Callable[[World, Any], Any]
    argument: Any


@dataclass(frozen=True)
class _Failure:
    """How a rank failed: the user's mistake, a traceback, or (without either) the exit code it was found with."""

    rank: int
    time_s: float
    mistake: GalvatronError | None = None
    trace: str = ""
    exitcode: int = 0


def run_ranks(nproc: int, work: Callable[[World, A], R], argument: A, device: DeviceName) -> R:
    """``work(world, argument)`` on ``nproc`` new processes; rank 0's result once all are done.

    Raises:
        GalvatronError: the first one any rank raised.
        WorkerCrash: a rank failed with anything else, or was killed.
        SystemExit: 128 + the signal, after one of SIGINT, SIGTERM and SIGHUP.
    """
    import torch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    # A forked child has torch imported already; CUDA, once asked, does not survive a fork.
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    sys.stdout.flush()  # or forked ranks would print it again
    with tempfile.TemporaryDirectory(prefix="galvatron-") as folder:
        threads = int(os.environ["OMP_NUM_THREADS"])
        task = _Task(nproc, device, str(Path(folder) / "store"), os.getpid(), threads, work, argument)
        pipes = [context.Pipe(duplex=False) for _ in range(nproc)]
        ranks = [context.Process(target=_serve, args=(task, rank, pipes[rank][1])) for rank in range(nproc)]
        with _stoppable(ranks) as request:
            try:
                for process in ranks:
                    process.start()
                    if request:
                        process.terminate()  # it was not there yet when the signal came
                results, failures = _collect(ranks, [receiver for receiver, _ in pipes])
                if not failures:
                    _await_end(ranks)
            finally:
                _end(ranks)
        if request:
            raise SystemExit(128 + request[0])
        if failures:
            raise _cause(failures)
        first: R = results[0]
        return first


@contextmanager
def _stoppable(ranks: Sequence[BaseProcess]) -> Iterator[list[int]]:
    """The stop signals that came: the first asks ``ranks`` to stop, any other ends them at once."""
    came: list[int] = []
    parent = os.getpid()

    def stop(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != parent:
            return  # a forked rank that has not set its own handlers yet
        for process in ranks:
            if process.pid is not None:
                process.kill() if came else process.terminate()
        came.append(signum)

    previous = {}
    if threading.current_thread() is threading.main_thread():
        asking = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, stop) for number in asking}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _collect(ranks: Sequence[BaseProcess], receivers: Sequence[Connection]) -> tuple[dict[int, Any], list[_Failure]]:
    """Every rank's result or failure, until all have answered or ``GRACE_S`` after the first failure."""
    results: dict[int, Any] = {}
    failures: list[_Failure] = []
    waiting = dict(enumerate(receivers))
    deadline = None
    while waiting:
        sources = {source: rank for rank, receiver in waiting.items() for source in (receiver, ranks[rank].sentinel)}
        ready = wait(list(sources), None if deadline is None else max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for rank in {sources[source] for source in ready}:  # type: ignore[index]
            answer = _answer(ranks[rank], rank, waiting.pop(rank))
            if isinstance(answer, _Failure):
                failures.append(answer)
                deadline = deadline or time.monotonic() + GRACE_S
            else:
                results[rank] = answer
    return results, failures


def _answer(process: BaseProcess, rank: int, receiver: Connection) -> Any:
    try:
        if receiver.poll():
            return receiver.recv()
    except (EOFError, OSError):
        pass  # killed while it wrote
    process.join()
    return _Failure(rank, time.time(), exitcode=process.exitcode or 0)


def _await_end(ranks: Sequence[BaseProcess]) -> None:
    deadline = time.monotonic() + END_S
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))


def _end(ranks: Sequence[BaseProcess]) -> None:
    for process in ranks:
        if process.pid is not None:
            process.kill()
            process.join()


def _cause(failures: list[_Failure]) -> Exception:
    """The error that began it: the user's mistakes, then killed processes, then the first crash (often an echo)."""
    ordered = sorted(failures, key=lambda failure: failure.time_s)
    mistakes = [failure.mistake for failure in ordered if failure.mistake is not None]
    if mistakes:
        return mistakes[0]
    for failure in ordered:
        if not failure.trace:
            return WorkerCrash(f"rank {failure.rank} {_ending(failure.exitcode)}")
    return WorkerCrash(f"rank {ordered[0].rank} failed:\n{ordered[0].trace}")


def _ending(exitcode: int) -> str:
    if exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}; is its memory exhausted?"
    return f"ended with exit code {exitcode} and no word"


def _serve(task: _Task, rank: int, sender: Connection) -> None:
    """One rank's life."""
    end_with(task.parent)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to the whole group; the parent passes them on
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": task.world_size, "LOCAL_WORLD_SIZE": task.world_size}
    os.environ.update({name: str(value) for name, value in place.items()})
    if rank != 0:
        _silence()
    try:
        result = _work(task, rank)
        sys.stdout.flush()
        sender.send(result if rank == 0 else None)
    except Exception as error:
        mistake = as_mistake(error)
        trace = "" if mistake else traceback.format_exc()
        sender.send(_Failure(rank, time.time(), mistake, trace))
        os._exit(2 if mistake else 1)  # no shutdown that waits for ranks which hang in a collective


def _work(task: _Task, rank: int) -> Any:
    import torch
    import torch.distributed as dist

    from galvatron.internals import FileStore
    from galvatron.parallelize.processes.world import destroy_world, init_world

    torch.set_num_threads(task.num_threads)
    world = init_world(task.device, FileStore(task.store, task.world_size))
    dist.barrier()  # a rank that is done must not leave while another still connects
    result = task.work(world, task.argument)
    destroy_world()
    return result


def _silence() -> None:
    """No output from this process, whoever writes it."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (open as long as the process lives)
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)


def end_with(parent: int) -> None:
    """Kill this process as soon as its parent, of id ``parent``, is gone, whatever ended that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent,), name="end-with-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    os.kill(os.getpid(), signal.SIGKILL)
