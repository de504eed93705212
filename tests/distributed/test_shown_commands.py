"""Every command that README, docs and help show, and that starts processes or needs torch, runs as it is shown."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from documented import LONG, commands, furnish, small
from galvatron.cli import main
from jobs import job_text

DOING = [
    command
    for command in commands()
    if re.match(r"galvatron (train|run|profile|convert|checkpoint|data) |torchrun |srun ", command)
]
SAMPLE = (
    "galvatron train job.toml --plan another.json --resume latest",
    "galvatron checkpoint verify runs/job",
    "galvatron data prepare job.toml",
    "galvatron convert to-hf runs/job exported",
    "galvatron convert from-hf openai-community/gpt2 models/gpt2",
)
"""What `make test` runs; the others are slow."""
SRUN = """#!{python}
import os, subprocess, sys

count, rest = sys.argv[2], sys.argv[3:]
while rest[0].startswith("--"):
    rest = rest[1:]
step = {{"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": count}}
step |= {{"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": count}}
tasks = [
    subprocess.Popen(rest, env={{**os.environ, **step, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}})
    for i in range(int(count))
]
sys.exit(max(task.wait() for task in tasks))
"""


def _main(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory that has done two steps of four."""
    folder = tmp_path_factory.mktemp("begun")
    furnish(folder)
    (folder / "job.toml").write_text(job_text(num_steps=2))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert _main(["galvatron", "train", "job.toml", "--plan", "plan.json", "--nproc", "2"], monkeypatch) == 0
    return folder / "runs" / "job"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    furnish(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(SRUN.format(python=sys.executable))
    (tmp_path / "bin" / "srun").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    return tmp_path


def test_the_sample_is_shown() -> None:
    assert set(SAMPLE) <= set(DOING)


@pytest.mark.parametrize(
    "command",
    [pytest.param(command, marks=[] if command in SAMPLE else [pytest.mark.slow]) for command in DOING],
)
def test_a_shown_command_of_the_doing_half_runs(
    command: str, folder: Path, begun: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for run in re.findall(r"runs/\w+", command) or ["runs/job"] * ("--resume" in command):
        if "--run-dir" not in command:
            shutil.copytree(begun, folder / run)
    if "from-hf" in command:
        GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=50)).save_pretrained(
            "openai-community/gpt2"
        )
    if "--lora" in command:
        pytest.importorskip("peft")
        LlamaForCausalLM(LlamaConfig(**LONG)).save_pretrained(".")
        job = Path("job.toml").read_text()
        Path("job.toml").write_text(job.replace('"config.json"', '"config.json"\nweights = true'))
    words = small(command)
    if words[0] == "galvatron":
        assert _main(words, monkeypatch) == 0, capfd.readouterr().err
    else:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_torchrun_starts_the_module_too(folder: Path) -> None:
    words = ["torchrun", "--nproc-per-node", "1", "-m", "galvatron.cli", "plan", "show", "plan.json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 devices, 1 stage of 2 layers")
