"""Processes for a verb: join the world that torchrun or Slurm made, or start local ones.

Takes a module-level function ``work(world, argument)``; runs it on every rank; gives rank 0's result.  Knows nothing of
what the work is, nor how local ranks live (see ``workers``).
"""

from __future__ import annotations

import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from galvatron.core.errors import ConfigError

from .lock import locked
from .workers import DeviceName, end_with, run_ranks

if TYPE_CHECKING:
    from galvatron.parallelize.processes.world import World

A = TypeVar("A")
R = TypeVar("R")


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
        "MASTER_PORT": environment.get("MASTER_PORT", str(_slurm_port(environment))),
    }


def _slurm_port(environment: Mapping[str, str]) -> int:
    """One port for all tasks of a job step; steps that share a node seldom share it, and ``meet`` tells them apart.

    Below 32768, where Linux hands out ports of its own.
    """
    return 12000 + zlib.crc32(_slurm_step(environment).encode()) % 20000


def _slurm_step(environment: Mapping[str, str]) -> str:
    """The job step and how often its job was requeued, in words."""
    job, step = environment.get("SLURM_JOB_ID", "?"), environment.get("SLURM_STEP_ID", "?")
    return f"Slurm job {job} step {step} start {environment.get('SLURM_RESTART_COUNT', '0')}"


def run_name(environment: Mapping[str, str], arguments: Sequence[str]) -> str:
    """What every rank of one run says alike, and no rank of another: launcher's names, and the command line."""
    launcher = ""
    if "TORCHELASTIC_RUN_ID" in environment:
        launcher = f"torchrun {environment['TORCHELASTIC_RUN_ID']}"
    elif "SLURM_PROCID" in environment:
        launcher = _slurm_step(environment)
    command = " ".join(("galvatron", *arguments))
    return f"{command!r} ({launcher})" if launcher else repr(command)


def is_joined(environment: Mapping[str, str]) -> bool:
    """Whether a launcher has made the world that this process is a rank of."""
    return ("RANK" in environment and "WORLD_SIZE" in environment) or bool(slurm_world(environment))


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
        self.joined = is_joined(os.environ)
        os.environ.update(slurm_world(os.environ))
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
            WorkerCrash: a local rank failed with anything else.
            SystemExit: a signal ended the local ranks.
        """
        if self.joined:
            return work(self._joined_world(), argument)
        return run_ranks(self.world_size, work, argument, self.device)

    def here(self, function: Callable[[], R]) -> R:
        """``function()`` in this process: once, or on every rank of a joined world, which it may then use."""
        if self.joined:
            self._joined_world()
        return function()

    def on_main(self, function: Callable[[], R]) -> R:
        """``function()`` once, on rank 0 of a joined world; its result, or its exception, on every rank."""
        if not self.joined:
            return function()
        from galvatron.parallelize.processes.ranks import on_rank_zero

        return self.here(lambda: on_rank_zero(function))

    @contextmanager
    def locked(self, directory: Path) -> Iterator[None]:
        """Hold ``directory`` for all ranks of this command, by one process that lives as long as it: see ``lock``.

        Raises:
            ConfigError: another command holds it.
        """
        with ExitStack() as stack:

            def hold() -> None:
                stack.enter_context(locked(directory))

            self.on_main(hold)
            yield

    def close(self) -> None:
        """Leave a joined world; local processes have ended already."""
        if self._world is not None:
            from galvatron.parallelize.processes.world import destroy_world

            self._world = None
            destroy_world()

    def _joined_world(self) -> World:
        if self._world is None:
            from galvatron.parallelize.processes.meeting import meet
            from galvatron.parallelize.processes.world import init_world

            if "TORCHELASTIC_RUN_ID" in os.environ:
                end_with(os.getppid())
            self._world = init_world(self.device, meet(run_name(os.environ, sys.argv[1:])))
        return self._world


@contextmanager
def processes(nproc: int | None, device: DeviceName = "auto", default: int = 1) -> Iterator[Processes]:
    """``Processes`` that leave a joined world at the end."""
    group = Processes(nproc, device, default)
    try:
        yield group
    finally:
        group.close()
