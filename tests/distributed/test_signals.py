"""Ctrl-C, SIGTERM and a terminal that hangs up: save, say so, end soon, with the signal's exit code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distributed.commands import Command
from distributed.test_kills import TRAIN, losses, saved_step, write_job

ENDS_S = 10.0
"""From the save to the end: 0.2 s as measured at a load of 38 on two cores, 33 s with the elastic agent."""


def begin(folder: Path) -> Command:
    """A command that has done steps since it started."""
    metrics = folder / "runs/job/metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    command = Command.start(folder, *TRAIN)
    assert command.await_that(lambda: metrics.exists() and metrics.stat().st_size > before), command.log
    return command


def test_each_signal_saves_ends_and_is_the_exit_code(tmp_path: Path) -> None:
    folder = write_job(tmp_path, num_steps=100_000, save_every=0)
    for number, word in (
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, "terminated"),
        (signal.SIGHUP, "ended, its terminal hung up"),
    ):
        before = saved_step(folder)
        command = begin(folder)
        if number == signal.SIGINT:
            os.killpg(command.pid, number)  # as a terminal does
        else:
            os.kill(command.pid, number)
        code, _ = command.end(120)
        assert code == 128 + number
        latest = folder / "runs/job/checkpoints/latest"
        assert time.time() - latest.stat().st_mtime < ENDS_S
        done = saved_step(folder)
        assert done == len(losses(folder)) > before
        lines = " ".join(command.log.split("\n")[-4:])
        assert f"stopped; runs/job/checkpoints/step-{done:06d} is complete" in lines
        assert lines.endswith(f"galvatron: {word} ")
        assert "Traceback" not in command.log
        assert not re.search(r"^\[?[WE]\d{4} ", command.log, re.MULTILINE), "raw lines of PyTorch's log"


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    folder = write_job(tmp_path, num_steps=100_000)
    command = begin(folder)
    os.kill(command.ranks()[1], signal.SIGSTOP)  # a step that never ends
    os.kill(command.pid, signal.SIGINT)
    time.sleep(1)
    assert len(command.members()) == 3, "one interrupt waits for the step"
    os.kill(command.pid, signal.SIGINT)
    code, _ = command.end(ENDS_S)
    assert code == 130
    assert "Traceback" not in command.log


@pytest.mark.slow
def test_ranks_end_with_torchrun(tmp_path: Path) -> None:
    folder = write_job(tmp_path, num_steps=100_000)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with (folder / "log.txt").open("w") as log:
        agent = subprocess.Popen(
            [*launcher, "-m", "galvatron", *TRAIN], cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    metrics = folder / "runs/job/metrics.jsonl"
    while not metrics.exists() or not metrics.stat().st_size:
        assert agent.poll() is None, (folder / "log.txt").read_text()
        time.sleep(0.1)
    ranks = children(agent.pid)
    assert len(ranks) == 2
    agent.kill()
    agent.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
