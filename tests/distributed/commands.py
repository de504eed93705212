"""The command line in processes of its own that can be killed, and what is left of them.

A command is forked from a server that has imported everything, so it starts in a fraction of a second; it leads a
session of its own, by which all its ranks are found whatever became of their parent.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from galvatron.testing.pool import PRELOAD


def _be_command(folder: Path, arguments: tuple[str, ...], path: list[str]) -> None:
    sys.path[:] = path
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # who runs the tests (nohup, a job in the background) may ignore them
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ["OMP_NUM_THREADS"] = "1"
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["galvatron", *arguments]
    from galvatron.cli import main

    main()


@dataclass
class Command:
    """A running command line; its output is appended to ``folder/log.txt``."""

    process: BaseProcess
    folder: Path

    @classmethod
    def start(cls, folder: Path, *arguments: str) -> Command:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOAD, "galvatron.cli", "galvatron.train"])
        process = context.Process(target=_be_command, args=(folder, arguments, sys.path))
        process.start()
        return cls(process, folder)

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def log(self) -> str:
        path = self.folder / "log.txt"
        return path.read_text() if path.exists() else ""

    def members(self) -> list[int]:
        """The living processes of the command, its leader first."""
        return sorted(pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _session(pid) == self.pid)

    def ranks(self) -> list[int]:
        return [pid for pid in self.members() if pid != self.pid]

    def await_that(self, condition: Callable[[], bool], limit_s: float = 120.0) -> bool:
        """Wait for ``condition``; False if the command ended before it."""
        deadline = time.monotonic() + limit_s
        while not condition():
            if not self.process.is_alive():
                return False
            assert time.monotonic() < deadline, self.log
            time.sleep(0.002)
        return True

    def end(self, limit_s: float) -> tuple[int, float]:
        """Its exit code, and the seconds until nothing of it was left; fails after ``limit_s``."""
        start = time.monotonic()
        while members := self.members():
            if time.monotonic() - start > limit_s:
                self.kill()
                raise AssertionError(f"{members} still there\n{self.log}")
            time.sleep(0.01)
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode, time.monotonic() - start

    def kill(self) -> None:
        for pid in self.members():
            os.kill(pid, signal.SIGKILL)


def _session(pid: int) -> int:
    """The session of a process that lives; 0 of a zombie or none."""
    try:
        state, _, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except (OSError, ValueError):
        return 0
    return 0 if state in "ZX" else int(session)
