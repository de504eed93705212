"""Every verb refuses at once what it could not write in the end, and loses no result."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from galvatron.plan import Plan
from jobs import CONFIG, job_text
from unit.cli.test_bad_input import PLAN
from unit.profiles import make_hardware, make_model

SEARCH = ("search", "--model", "model.json", "--cluster", "hardware.json", "--global-batch-size", "8", "--no-baselines")
Verb = Callable[..., tuple[int, str]]


@pytest.fixture
def verb(
    tmp_path: Path,
    galvatron: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Verb:
    """Run the command line beside two profiles, a job and its text: (exit code, standard error)."""
    make_model().save(tmp_path / "model.json")
    make_hardware(4).save(tmp_path / "hardware.json")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "text.txt").write_text("All work and no play. " * 40)
    (tmp_path / "job.toml").write_text(job_text(num_steps=2))
    PLAN.save(tmp_path / "plan.json")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        return galvatron(*arguments), capsys.readouterr().err

    return run


def _files(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((*SEARCH, "--out", "plan.svg"), "is where the plan's picture goes; name the plan plan.json"),
        ((*SEARCH, "--out", "model.json"), "must not replace model.json, which is read here"),
        ((*SEARCH, "--out", "folder"), "must name a file to write but folder is a folder"),
        ((*SEARCH, "--out", ""), "must name a file to write but . is a folder"),
        ((*SEARCH, "--out", "text.txt/plan.json"), "cannot be written"),
        (("profile", "hardware", "--out", "folder"), "must name a file to write but folder is a folder"),
        (
            ("profile", "model", "config.json", "--seq-len", "16", "--out", "config.json"),
            "must not replace config.json",
        ),
        (("plan", "export", "plan.json", "--format", "megatron", "--out", "plan.json"), "must not replace plan.json"),
        (
            ("plan", "import", "plan.json", "--world-size", "4", "--seq-len", "8", "--out", "folder"),
            "must name a file to write but folder is a folder",
        ),
        (
            ("import", "hetu", "--computation", "a", "--memory", "b", "--hardware", "c", "--out", "text.txt"),
            "must be a folder to write files into but text.txt is a file",
        ),
        (("convert", "to-hf", "runs", "folder"), "must be a new or empty folder but folder holds files"),
        (
            ("convert", "from-hf", "config.json", "text.txt"),
            "must be a folder to write files into but text.txt is a file",
        ),
        (("run", "job.toml", "--run-dir", "text.txt"), "the run directory must be a folder"),
        (("train", "job.toml", "--plan", "plan.json", "--run-dir", "text.txt"), "the run directory must be a folder"),
    ],
)
def test_an_output_that_cannot_be_written(verb: Verb, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    before = _files(tmp_path)
    code, error = verb(*arguments)
    assert code == 2
    assert error.startswith("galvatron: ")
    assert error.count("\n") == 1
    assert says in error
    assert _files(tmp_path) == before


def test_a_device_is_written_into_and_gets_no_picture(verb: Verb) -> None:
    assert verb(*SEARCH, "--out", "/dev/null") == (0, "")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert not Path("/dev/null.svg").exists()


def test_a_plan_that_its_disk_refuses_is_kept(verb: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    code, error = verb(*SEARCH, "--out", "/dev/full")
    (kept,) = tmp_path.glob("galvatron-*-full")
    assert code == 2
    assert f"kept as {kept}" in error
    assert Plan.load(kept).world_size == 4


def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        world = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = subprocess.run(
            [sys.executable, "-m", "galvatron", "profile", "hardware", "--out", tmp_path / "hardware.json"],
            env={**os.environ, **world},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert f"cannot meet at MASTER_ADDR:MASTER_PORT=127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
