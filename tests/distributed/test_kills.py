"""``kill -9`` of a command or of one of its ranks, at any moment: the same command goes on and nothing is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from distributed.commands import Command
from galvatron.plan import LayerStrategy, Plan
from galvatron.train import all_checkpoints, find_checkpoint, read_metrics, read_state
from galvatron.train.index import INDEX_FILE, CheckpointIndex
from jobs import CONFIG, job_text

SHARDED, CUT = LayerStrategy(dp_shard=2, zero=3), LayerStrategy(tp=2)
PLAN = Plan(
    model="tiny", world_size=2, layers_per_stage=(2,), global_batch_size=4, seq_len=16,
    embedding=SHARDED, layers=(SHARDED, CUT), head=CUT,
)  # fmt: skip
TRAIN = ("train", "job.toml", "--plan", "plan.json")
SAVE_EVERY = 6
MOMENTS = ("start", "step", "save", "resume")
GONE_S = 10.0
"""After a kill nothing may be left of a command for longer."""


def write_job(folder: Path, *, num_steps: int = 60, save_every: int = SAVE_EVERY) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    (folder / "job.toml").write_text(job_text(num_steps=num_steps, lr=1e-2, save_every=save_every, keep_checkpoints=2))
    PLAN.save(folder / "plan.json")
    return folder


def losses(folder: Path) -> list[float]:
    rows = [row for row in read_metrics(folder / "runs/job/metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def undisturbed(folder: Path, *arguments: str) -> list[float]:
    command = Command.start(folder, *arguments)
    assert command.end(300)[0] == 0, command.log
    return losses(folder)


def saved_step(folder: Path) -> int:
    """The step of the latest checkpoint, all of whose bytes must be as they were saved; 0 before the first."""
    root = folder / "runs/job/checkpoints"
    if not (root / "latest").exists():
        return 0
    checkpoint = find_checkpoint(root, "latest")
    assert list(CheckpointIndex.load(checkpoint / INDEX_FILE).damage(checkpoint)) == []
    return read_state(checkpoint).step


@dataclass
class Kills:
    """Runs that are killed again and again until they are done, and what was seen."""

    folder: Path
    arguments: tuple[str, ...]
    expected: list[float]
    random: random.Random
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)
    gone_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    resumed: int = 0

    @property
    def count(self) -> int:
        return self.seen.total()

    def run_killed_at(self, moments: tuple[str, ...], template: Path | None = None) -> None:
        """One run from its beginning to its end, with a kill at each of ``moments``."""
        shutil.rmtree(self.folder / "runs", ignore_errors=True)
        (self.folder / "log.txt").unlink(missing_ok=True)
        if template is not None:
            shutil.copytree(template, self.folder / "runs/job")
        saved = 0
        for moment in moments:
            command = Command.start(self.folder, *self.arguments)
            self._kill(command, moment, begun=saved > 0)
            before, saved = saved, saved_step(self.folder)
            assert saved >= before, f"the checkpoint of step {before} is lost"
        command = Command.start(self.folder, *self.arguments)
        assert command.end(300)[0] == 0, command.log
        self.resumed += saved > 0
        assert losses(self.folder) == self.expected
        assert saved_step(self.folder) == len(self.expected)
        assert len(all_checkpoints(self.folder / "runs/job")) <= 2
        left = [path.name for path in (self.folder / "runs/job").rglob("*") if path.name.startswith((".", "run.lock"))]
        assert left == []

    def _kill(self, command: Command, moment: str, *, begun: bool) -> None:
        if self._await(command, moment):
            time.sleep(self.random.uniform(0, {"save": 0.02, "step": 0.1}.get(moment, 2.0)))
        targets = {"parent": [command.pid], "rank": command.ranks()}
        victim = self.random.choice(["parent", "rank"] if targets["rank"] else ["parent"])
        try:
            os.kill(self.random.choice(targets[victim]), signal.SIGKILL)
        except ProcessLookupError:
            return  # it was done already
        code, seconds = command.end(GONE_S)
        if code == 0:
            return
        assert code == (-signal.SIGKILL if victim == "parent" else 1), command.log
        if victim == "rank":
            assert "was killed by SIGKILL; is its memory exhausted?" in command.log.splitlines()[-1], command.log
        assert "Traceback" not in command.log
        assert "already holds" not in command.log
        if moment in ("start", "resume"):
            moment = "resume" if begun else "start"
        self.seen[moment, victim] += 1
        self.gone_s[victim].append(seconds)

    def _await(self, command: Command, moment: str) -> bool:
        """Wait for a step or a save of ``command``, by chance the first or a later one; False if it ended before."""
        checkpoints, metrics = self.folder / "runs/job/checkpoints", self.folder / "runs/job/metrics.jsonl"
        steps, before = self.random.randrange(1, 20), _num_lines(metrics)
        if moment == "step":
            return command.await_that(lambda: _num_lines(metrics) >= before + steps)
        if moment == "save":
            saves, latest = self.random.randrange(3), _number(checkpoints / "latest")
            return command.await_that(
                lambda: (
                    _number(checkpoints / "latest") >= latest + saves * SAVE_EVERY
                    and any(checkpoints.glob(".step-*.tmp"))
                )
            )
        return True

    def table(self) -> str:
        lines = [f"{'moment':>8} {'parent':>7} {'rank':>5}"]
        for moment in sorted({moment for moment, _ in self.seen}):
            lines.append(f"{moment:>8} {self.seen[moment, 'parent']:>7} {self.seen[moment, 'rank']:>5}")
        for victim, seconds in self.gone_s.items():
            lines.append(f"gone after a kill of the {victim}: {max(seconds):.2f} s at most")
        return "\n".join([*lines, f"{self.count} kills, {self.resumed} runs went on from a checkpoint"])


def _num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _number(path: Path) -> int:
    """The step that a pointer names."""
    return int(path.read_text().strip().removeprefix("step-")) if path.exists() else 0


def test_a_few_kills(tmp_path: Path) -> None:
    folder = write_job(tmp_path)
    kills = Kills(folder, TRAIN, undisturbed(folder, *TRAIN), random.Random(7))
    kills.run_killed_at(("start", "step", "save", "resume"))
    assert kills.count >= 3, kills.table()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_kills(tmp_path: Path) -> None:
    """80 of ``train``, 20 of ``run`` whose profiles are there, so that it trains under one plan."""
    generator = random.Random(20261126)
    for arguments, number in ((TRAIN, 80), (("run", "job.toml"), 20)):
        folder = write_job(tmp_path / arguments[0])
        expected = undisturbed(folder, *arguments)
        template = None
        if arguments[0] == "run":
            template = tmp_path / "profiles"
            template.mkdir()
            for name in ("hardware.json", "model.json"):
                shutil.copy(folder / "runs/job" / name, template)
        kills = Kills(folder, arguments, expected, generator)
        while kills.count < number:
            kills.run_killed_at(tuple(generator.sample(MOMENTS, 4)), template)
        print(f"\n{' '.join(arguments)}\n{kills.table()}")
