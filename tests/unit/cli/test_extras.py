"""Without the extra that trains, every verb that needs it says so in one sentence; the others run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from documented import furnish
from galvatron.cli.mistakes import OPTIONAL

NEED_IT = [
    ("profile", "hardware"),
    ("profile", "model", "config.json", "--seq-len", "16"),
    ("train", "job.toml", "--plan", "plan.json"),
    ("run", "job.toml"),
    ("data", "prepare", "job.toml"),
    ("checkpoint", "verify", "runs"),
    ("convert", "to-hf", "runs", "out"),
    ("convert", "from-hf", "config.json", "out"),
]


def _without(names: tuple[str, ...], arguments: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.modules.update(dict.fromkeys({names!r})); from galvatron.cli import main; main()"
    words = [sys.executable, "-c", code, *arguments]
    return subprocess.run(words, cwd=folder, env=os.environ, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", NEED_IT, ids=" ".join)
def test_a_verb_that_needs_the_extra_names_it(arguments: tuple[str, ...], tmp_path: Path) -> None:
    furnish(tmp_path)
    (tmp_path / "runs").mkdir(exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    done = _without(OPTIONAL, arguments, tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("galvatron: this needs ")
    assert done.stderr.endswith("which is not installed; pip install 'galvatron[train]'\n")
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_plans_need_no_extra(tmp_path: Path) -> None:
    furnish(tmp_path)
    assert _without(OPTIONAL, ("plan", "show", "plan.json"), tmp_path).returncode == 0
