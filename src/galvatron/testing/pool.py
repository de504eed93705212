"""A pool of worker processes, gloo ones on the CPU or NCCL ones on GPUs, started once and sent functions.

Takes a module-level function and picklable arguments; gives what it returns on every rank.  The workers
are forked from a server process that has imported torch and transformers and done nothing else, so that
neither threads nor CUDA of the caller reach them, and the imports are paid for once.  Knows nothing of
models or plans.  As with everything in ``multiprocessing``, a script that uses a pool guards its own
work by ``if __name__ == "__main__"``.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
DeviceType = Literal["cpu", "cuda"]

PRELOAD = ("torch.distributed.fsdp", "galvatron.testing.preload")
"""What the fork server imports before the first fork."""

GRACE_S = 2.0
"""How long the other ranks may take to report after the first failure, before they are ended."""


class WorkerError(RuntimeError):
    """A function failed on some ranks of a pool.

    Attributes:
        failures: rank → traceback text, the rank that failed first in front; ranks that only waited for
            a failed one may be absent.
    """

    def __init__(self, failures: dict[int, str]) -> None:
        self.failures = failures
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, text in failures.items()))


@dataclass
class Pool:
    """Worker processes on this machine; ranks 0 … ``world_size`` - 1 of them form a world for each call.

    Workers start when a call first needs them.  A fresh default process group for every call costs 12 ms
    (one rank) to 100 ms (eight) on two cores and leaves no groups, threads or files behind.

    ``device``: ``cpu`` is a gloo world; ``cuda`` an NCCL one, whose ranks are dealt the GPUs there are in turn.  Where
    they share a GPU they tell NCCL that they are hosts of their own, which then talk over sockets: slow, but the code
    that many GPUs run.  ``start``: ``spawn`` where the fork server cannot import torch without touching CUDA.
    """

    timeout_s: float = 120.0
    device: DeviceType = "cpu"
    start: Literal["forkserver", "spawn"] = "forkserver"
    _workers: list[tuple[BaseProcess, Connection]] = field(default_factory=list, repr=False)

    def run(self, fn: Callable[..., T], *args: Any, world_size: int, timeout_s: float | None = None) -> list[T]:
        """Call ``fn(*args)`` on ``world_size`` ranks with the default process group up; results in rank order.

        Args:
            fn: a function that pickle finds by its name (module level); every rank sees the same ``args``.
            world_size: ranks of the world.  RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE are set.
            timeout_s: seconds the whole call may take; default the pool's own.

        Raises:
            WorkerError: a rank raised, died or did not answer in time.  The workers are replaced, so
                that the next call starts clean.
        """
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        self._start(world_size)
        with tempfile.TemporaryDirectory(prefix="galvatron-pool-") as folder:
            task = _Task(fn, args, world_size, str(Path(folder) / "store"), limit_s)
            message = pickle.dumps((sys.path, pickle.dumps(task)))
            for _, connection in self._workers[:world_size]:
                connection.send_bytes(message)
            results, failures = self._collect(world_size, limit_s)
        if failures:
            self.close()
            raise WorkerError(failures)
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        """End all workers; a later ``run`` starts new ones."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, count: int) -> None:
        if not all(process.is_alive() for process, _ in self._workers):
            self.close()
        context: Any = multiprocessing.get_context(self.start)
        if self.start == "forkserver":
            context.set_forkserver_preload(list(PRELOAD))
        for rank in range(len(self._workers), count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs, self.device), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self, world_size: int, limit_s: float) -> tuple[dict[int, Any], dict[int, str]]:
        results: dict[int, Any] = {}
        failures: dict[int, _Failure] = {}
        waiting: dict[Any, int] = {connection: rank for rank, (_, connection) in enumerate(self._workers[:world_size])}
        deadline = time.monotonic() + limit_s
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)
                answer = _receive(connection)
                if isinstance(answer, _Failure):
                    deadline = deadline if failures else min(deadline, time.monotonic() + GRACE_S)
                    failures[rank] = answer
                else:
                    results[rank] = answer
        if waiting and not failures:
            return results, dict.fromkeys(waiting.values(), f"no answer within {limit_s:g} s")
        first_to_last = sorted(failures, key=lambda rank: failures[rank].time_s)
        return results, {rank: failures[rank].text for rank in first_to_last}


@dataclass(frozen=True)
class _Task:
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    world_size: int
    store: str
    timeout_s: float


@dataclass(frozen=True)
class _Failure:
    time_s: float  # of this machine's monotonic clock
    text: str


def _receive(connection: Any) -> Any:
    try:
        return pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionError):
        # a process that dies makes the others fail, so it comes before them
        return _Failure(0.0, "the process ended without an answer")


def _serve(rank: int, connection: Connection, device: DeviceType) -> None:
    """A worker's life: one task after another until the caller closes the connection."""
    torch.set_num_threads(1)  # many ranks share few cores
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    while True:
        try:
            path, task = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        sys.path[:] = path  # test modules of the caller are importable here too
        connection.send_bytes(_answer(rank, task, device))
        _leave_world()  # after a failure only now: ranks that lose their connection must not seem to fail first


def _answer(rank: int, message: bytes, device: DeviceType) -> bytes:
    try:
        return pickle.dumps(_perform(rank, pickle.loads(message), device))
    except BaseException:  # whatever it was, the caller hears of it
        return pickle.dumps(_Failure(time.monotonic(), traceback.format_exc()))


def _perform(rank: int, task: _Task, device: DeviceType) -> Any:
    place = _gpu_of(rank, task.world_size) if device == "cuda" else None
    local_rank = rank if place is None else place.index
    ranks = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": task.world_size, "LOCAL_WORLD_SIZE": task.world_size}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    dist.init_process_group(
        "gloo" if place is None else "nccl",
        init_method=f"file://{task.store}",
        rank=rank,
        world_size=task.world_size,
        timeout=timedelta(seconds=task.timeout_s),
        device_id=place,
    )
    dist.barrier()  # a rank that is done must not leave while another still connects
    result = task.fn(*task.args)
    _leave_world()
    return result


def _gpu_of(rank: int, world_size: int) -> torch.device:
    """The GPU of ``rank``; ranks of one GPU are hosts of their own, for NCCL refuses two of one host."""
    count = torch.cuda.device_count()
    if count < world_size:
        os.environ |= {"NCCL_HOSTID": f"rank {rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
        os.environ |= {"NCCL_MAX_NCHANNELS": "1"}  # every rank's kernels wait for those of others on one GPU
    place = torch.device("cuda", rank % count)
    torch.cuda.set_device(place)
    return place


def _leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
