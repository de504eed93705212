"""Processes for a verb: join the world that torchrun or Slurm made, or start local ones.

Takes a module-level function ``work(world, argument)``; runs it on every rank; gives rank 0's result.  A
GalvatronError of any rank comes back as that one sentence; a crash comes back as the first rank's traceback.
Knows nothing of what the work is.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from galvatron.core import errors
from galvatron.core.errors import ConfigError, GalvatronError
from galvatron.core.files import write_atomic

from .mistakes import as_mistake

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from galvatron.parallelize.world import World

DeviceName = Literal["cpu", "cuda", "auto"]
A = TypeVar("A")
R = TypeVar("R")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class WorkerCrash(Exception):
    """A rank failed with something that is not the user's mistake; the message is its traceback."""


def slurm_world(environment: Mapping[str, str]) -> dict[str, str]:
    """The torchrun variables that a Slurm job step implies; empty outside of ``srun`` with several tasks.

    A batch script has SLURM_PROCID too, so only SLURM_STEP_NUM_TASKS, which ``srun`` alone sets, counts.
    """
    world_size = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or "SLURM_PROCID" not in environment or world_size == "1":
        return {}
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "localhost"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(_first_count(environment.get("SLURM_STEP_TASKS_PER_NODE", world_size))),
        "MASTER_ADDR": environment.get("MASTER_ADDR", first_host(nodes)),
        # Jobs that share a node must not share a port.
        "MASTER_PORT": environment.get("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000)),
    }


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: ``gpu[003-007,9],login1`` → ``gpu003``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    return (match[1] + (match[2] or "")) if match else "localhost"


def _first_count(text: str) -> int:
    """``4(x2),3`` (Slurm's tasks per node) → 4."""
    return int(re.split(r"[(,]", text)[0])


class Processes:
    """The ranks a verb works with: a joined world, or ``nproc`` local processes started for every ``run``.

    Args:
        nproc: processes to start; in a joined world it must be absent or equal to that world's size.
        device: ``cpu``, ``cuda`` or ``auto``, as ``init_world`` takes it.
        default: processes to start where ``nproc`` is None.
    """

    def __init__(self, nproc: int | None, device: DeviceName = "auto", default: int = 1) -> None:
        os.environ.update(slurm_world(os.environ))
        self.joined = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        self.device = device
        self.world_size = int(os.environ["WORLD_SIZE"]) if self.joined else (nproc or default)
        self._world: World | None = None
        if self.joined and nproc is not None and nproc != self.world_size:
            raise ConfigError(
                f"{nproc} processes are asked for but the launcher started {self.world_size}; "
                f"leave out --nproc, or start {nproc} processes"
            )

    def run(self, work: Callable[[World, A], R], argument: A) -> R:
        """``work(world, argument)`` on every rank; returns rank 0's result (in a joined world: this rank's).

        Raises:
            GalvatronError: the first one any rank raised.
            WorkerCrash: a rank failed with anything else.
        """
        if self.joined:
            return work(self._joined_world(), argument)
        return _start(self.world_size, work, argument, self.device)

    def here(self, function: Callable[[], R]) -> R:
        """``function()`` in this process: once, or on every rank of a joined world, which it may then use."""
        if self.joined:
            self._joined_world()
        return function()

    def on_main(self, function: Callable[[], R]) -> R:
        """``function()`` once, on rank 0 of a joined world; its result, or its exception, on every rank."""
        if not self.joined:
            return function()
        from galvatron.parallelize.ranks import on_rank_zero

        return self.here(lambda: on_rank_zero(function))

    def close(self) -> None:
        """Leave a joined world; local processes have ended already."""
        if self._world is not None:
            from galvatron.parallelize.world import destroy_world

            self._world = None
            destroy_world()

    def _joined_world(self) -> World:
        if self._world is None:
            from galvatron.parallelize.world import init_world

            self._world = init_world(self.device)
        return self._world


@contextmanager
def processes(nproc: int | None, device: DeviceName = "auto", default: int = 1) -> Iterator[Processes]:
    """``Processes`` that leave a joined world at the end."""
    group = Processes(nproc, device, default)
    try:
        yield group
    finally:
        group.close()


def _start(nproc: int, work: Callable[[World, A], R], argument: A, device: DeviceName) -> R:
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    with tempfile.TemporaryDirectory(prefix="galvatron-") as folder, _quiet_agent():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            # A forked child has torch imported already; CUDA, once asked, does not survive a fork.
            start_method="spawn" if torch.cuda.is_available() else "fork",
        )
        sys.stdout.flush()  # or forked ranks would print it again
        gc.collect()  # the agents of earlier starts, before a rank inherits them
        try:
            results = elastic_launch(config, _child)(work, argument, device, folder)
        except ChildFailedError as failure:
            raise _first_failure(Path(folder), failure) from None
        except SignalException:
            raise KeyboardInterrupt from None
    first: R = results[0]
    return first


def _child(work: Callable[[World, A], R], argument: A, device: DeviceName, folder: str) -> R:
    """One rank: errors go into ``folder`` for the parent, output only from rank 0."""
    # What a fork inherits is the parent's to clean up: the agent's stores join threads that do not exist here.
    gc.freeze()
    import torch

    from galvatron.parallelize.world import destroy_world, init_world

    for name in _SIGNALS:
        signal.signal(name, signal.SIG_DFL)  # the agent's handlers, inherited by fork, would wait for Python code
    rank = int(os.environ["RANK"])
    if rank != 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (open as long as the process lives)
        for descriptor in (1, 2):
            os.dup2(sys.stdout.fileno(), descriptor)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        result = work(init_world(device), argument)
        destroy_world()
        return result
    except Exception as error:
        mistake = as_mistake(error)
        kind, message = (type(mistake).__name__, str(mistake)) if mistake else ("", traceback.format_exc())
        report = {"time_s": time.time(), "rank": rank, "kind": kind, "text": message}
        write_atomic(Path(folder) / f"failure-{rank}.json", json.dumps(report))
        sys.stdout.flush()
        if mistake is None:
            time.sleep(1)  # perhaps the echo of a rank that was killed: let the agent see that one first
        os._exit(2 if mistake else 1)  # no shutdown that waits for ranks which hang in a collective


def _first_failure(folder: Path, failure: ChildFailedError) -> Exception:
    """The error that began it: the user's mistakes, then killed processes, then the first crash (often an echo)."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("failure-*.json")]
    mistakes = [report for report in reports if report["kind"]]
    if mistakes:
        first = min(mistakes, key=lambda report: report["time_s"])
        error: GalvatronError = getattr(errors, first["kind"], GalvatronError)(first["text"])
        return error
    for rank, process in failure.failures.items():
        if process.exitcode < 0 or not reports:
            return WorkerCrash(f"rank {rank} was killed by {_signal_name(process.exitcode)}; is its memory exhausted?")
    first = min(reports, key=lambda report: report["time_s"])
    return WorkerCrash(f"rank {first['rank']} failed:\n{first['text']}")


def _signal_name(exitcode: int) -> str:
    return signal.Signals(-exitcode).name if exitcode < 0 else f"exit code {exitcode}"


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """The elastic agent without its log of our errors, and the signal handlers as they were."""
    loggers = [logging.getLogger(name) for name in ("torch.distributed.elastic", "torch.multiprocessing")]
    handlers = {name: signal.getsignal(name) for name in _SIGNALS}
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, handler in handlers.items():
            signal.signal(name, handler)
