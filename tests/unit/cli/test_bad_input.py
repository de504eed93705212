"""Each kind of bad input is one clear sentence, exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from galvatron.plan import LayerStrategy, Plan
from jobs import CONFIG, job_text

SHORT = {**CONFIG, "num_key_value_heads": 1, "max_position_embeddings": 32}
PLAN = Plan(
    model="tiny",
    world_size=2,
    layers_per_stage=(2,),
    global_batch_size=4,
    seq_len=16,
    embedding=LayerStrategy(dp_replicate=2),
    layers=(LayerStrategy(dp_replicate=2),) * 2,
    head=LayerStrategy(dp_replicate=2),
)

Fails = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a good job, model, text and plan, made current."""
    (tmp_path / "config.json").write_text(json.dumps(SHORT))
    (tmp_path / "text.txt").write_text("All work and no play. " * 40)
    (tmp_path / "job.toml").write_text(job_text(num_steps=2))
    PLAN.save(tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fails(galvatron: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run the command line; it must exit with 2; gives its standard error."""

    def run(*arguments: str) -> str:
        assert galvatron(*arguments) == 2
        message = capsys.readouterr().err
        assert message.startswith("galvatron: ")
        assert message.count("\n") == 1, "one sentence, no traceback"
        return message

    return run


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "num_steps = 2",
            "num_steps = 2\nlearning_rate = 1",
            r"train\.learning_rate: unknown key; known here: .*\blr\b",
        ),
        ("[train]", '[search]\nmemory = "36 gigs"\n[train]', r"search\.memory: .*got '36 gigs'; write 512MiB"),
        ("num_steps = 2", "num_steps = -2", r"train\.num_steps: .*at least 1 \(got -2\)"),
        ("num_steps = 2", "num_steps = 2\n[resume]\nat_step = 2", "resume.at_step=2 must be below train.num_steps=2"),
        ("[train]", "[train", "job.toml is not TOML"),
        ("config.json", "no-such.json", "no-such.json"),
        ("text.txt", "no-such.txt", "no-such.txt does not exist"),
        ("seq_len = 16", "seq_len = 64", "train.seq_len=64 must not exceed the model's 32 positions"),
        ("num_steps = 2", "num_steps = 2\nwarmup_steps = 3", "warmup_steps=3 must not exceed num_steps=2"),
    ],
)
def test_a_wrong_job(folder: Path, fails: Fails, old: str, new: str, message: str) -> None:
    edit(folder / "job.toml", old, new)
    error = fails("run", "job.toml")
    assert re.search(message, error), error
    assert not (folder / "runs" / "job").exists()


def test_a_missing_job(folder: Path, fails: Fails) -> None:
    assert "none.toml does not exist" in fails("run", "none.toml")


def test_an_unsupported_model(folder: Path, fails: Fails) -> None:
    edit(folder / "config.json", '"llama"', '"dbrx"')
    assert "galvatron trains chains of layers between an embedding and a head" in fails("run", "job.toml")
    assert "model_type='dbrx'" in fails("profile", "model", "config.json", "--seq-len", "16")


@pytest.mark.parametrize(("text", "message"), [("", "text.txt' has no text"), ("too short", "give more data or lower")])
def test_too_little_data(folder: Path, fails: Fails, text: str, message: str) -> None:
    (folder / "text.txt").write_text(text)
    assert message in fails("run", "job.toml")


def test_an_empty_dataset_leaves_no_run_directory(folder: Path, fails: Fails) -> None:
    (folder / "text.txt").write_text("")
    fails("run", "job.toml", "--run-dir", "fresh")
    assert not (folder / "fresh").exists()


def test_a_vocabulary_smaller_than_the_tokenizer(folder: Path, fails: Fails) -> None:
    edit(folder / "config.json", "257", "200")
    assert "tokenizer bytes has 257 tokens but the model's vocabulary only 200" in fails("run", "job.toml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"world_size": 2', '"world_size": 4', "the plan is for world_size=4 but 2 processes run; start 4 processes"),
        ('"seq_len": 16', '"num_microbatches": 3, "seq_len": 16', "num_microbatches=3 must divide global_batch_size=4"),
        ('"layers": "0-1"', '"layers": "0-2"', "must sum to the 3 layers"),
        ('"embedding": {', '"embedding": {"tp": 2, ', "multiply to 4 but a stage has 2 devices"),
        ('"seq_len": 16', '"seq_length": 16', "seq_len: must be given"),
        ('"version": 1', '"version": 99', "plan.json has version 99; this galvatron reads version 1"),
        ('"format"', '"formats"', 'plan.json lacks "format": "galvatron.plan"'),
    ],
)
def test_a_wrong_plan(folder: Path, fails: Fails, old: str, new: str, message: str) -> None:
    edit(folder / "plan.json", old, new)
    assert message in fails("train", "job.toml", "--plan", "plan.json")
    assert not (folder / "runs" / "job" / "checkpoints").exists()


def test_an_unknown_checkpoint(folder: Path, fails: Fails) -> None:
    assert "holds no" in fails("convert", "to-hf", "nowhere", "out")
    assert not (folder / "out").exists()
