"""Every example of a task: a few steps of its job by hand, and, slow, the whole of it as it is shown.

What evaluations say is what transformers says of the exported model.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from exported import evaluated_by_transformers

from galvatron.cli.generate import check_generates, generate
from galvatron.cli.rundir import RunDirectory
from galvatron.core.errors import ConfigError
from galvatron.core.job import GenerateSection, Job
from galvatron.models import auto_class, build_spec, load_config, task_of
from galvatron.plan import LayerStrategy, Plan
from galvatron.train import read_metrics

EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Shown:
    """An example, its loss and the metric of what is held out, and where that must come to in a whole run."""

    name: str
    loss: str
    metric: str
    most: float | None = None
    least: float | None = None
    base: str | None = None


SHOWN = (
    Shown("masked_words", "eval_loss", "eval_perplexity", most=75),
    Shown("kinds_of_text", "validation_loss", "validation_accuracy", least=0.8, base="masked_words_model"),
    Shown("missing_spans", "eval_loss", "eval_perplexity", most=75),
    Shown("digits", "validation_loss", "validation_accuracy", least=0.95),
    Shown("captions", "validation_loss", "validation_accuracy", least=0.85),
    Shown("questions", "validation_loss", "validation_perplexity", most=1.6),
    Shown("tones", "validation_loss", "validation_perplexity", most=1.4),
)
DRAWN = ("captions", "questions", "tones")
"""Whose pictures or sounds are as many as asked for."""
WITH_DIGITS = ("digits", "captions", "questions")
SHORTER = (("num_steps", 3), ("warmup_steps", 1), ("eval_every", 0), ("eval_batches", 2), ("global_batch_size", 8))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the examples, as the current directory, from which they can be imported."""
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "examples")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.mark.parametrize("shown", SHOWN, ids=lambda shown: shown.name)
def test_an_example_trains_under_two_plans_and_is_exported(
    shown: Shown, folder: Path, galvatron: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    if shown.name in WITH_DIGITS:
        pytest.importorskip("sklearn")
    importlib.import_module(shown.name).prepare(**({"train": 64, "held_out": 24} if shown.name in DRAWN else {}))
    if shown.base is not None:
        importlib.import_module("masked_words").prepare()
        config = load_config(folder / "examples" / shown.base)
        auto_class(config).from_config(config).save_pretrained("runs/masked_words/exported")
    path = folder / "examples" / f"{shown.name}.toml"
    path.write_text(shorter(path.read_text()))
    for name, resume in (("first", ()), ("second", ("--resume", "latest"))):
        plans(Job.load(path))[name].save(folder / f"{name}.json")
        path.write_text(path.read_text().replace("num_steps = 3", f"num_steps = {4 if resume else 3}"))
        assert galvatron("train", str(path), "--plan", f"{name}.json", *resume) == 0, capfd.readouterr().err
    assert galvatron("convert", "to-hf", f"runs/{shown.name}", "exported") == 0
    check_exported(shown, folder, path)
    assert galvatron("convert", "from-hf", "exported", "saved-again") == 0
    job = Job.load(path).model_copy(update={"generate": GenerateSection(prompt="the value", max_new_tokens=2)})
    if shown.name == "missing_spans":
        generate(job, RunDirectory(folder / "runs/missing_spans"))
        assert "it goes on from the prompt:" in " ".join(capfd.readouterr().out.split())
    else:
        with pytest.raises(ConfigError, match=r"\[generate\] is for causal_lm and seq2seq_lm, and the model is for"):
            check_generates(job, task_of(load_config("exported")))
    if shown.name == "kinds_of_text":
        assert load_config("exported").id2label == {0: "code", 1: "comment", 2: "documentation"}


@pytest.mark.slow
@pytest.mark.parametrize("shown", SHOWN, ids=lambda shown: shown.name)
def test_a_whole_example_learns(shown: Shown, folder: Path) -> None:
    if shown.name in WITH_DIGITS:
        pytest.importorskip("sklearn")
    words = [sys.executable, f"examples/{shown.name}.py"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Resume under another plan" in done.stdout
    shutil.copytree(f"runs/{shown.name}/exported", "exported")
    value = check_exported(shown, folder, folder / "examples" / f"{shown.name}.toml")
    assert shown.least is None or value >= shown.least
    assert shown.most is None or value <= shown.most


def shorter(job: str) -> str:
    """A job of a few steps."""
    for name, value in SHORTER:
        job = re.sub(rf"^{name} = \d+", f"{name} = {value}", job, flags=re.MULTILINE)
    return job.partition("[resume]")[0]


def plans(job: Job) -> dict[str, Plan]:
    """Two plans of two ranks: sharded and cut, and replicated with recompute."""
    config = load_config(job.model.path, job.model.task, job.model.num_labels)
    layers = build_spec(config).num_layers
    shared, cut, whole = LayerStrategy(dp_shard=2, zero=3), LayerStrategy(tp=2), LayerStrategy(dp_replicate=2)
    sizes = {"global_batch_size": job.train.global_batch_size, "seq_len": job.train.seq_len, "world_size": 2}
    kinds = {"first": (shared, cut), "second": (whole, LayerStrategy(dp_replicate=2, recompute="full"))}
    return {
        name: Plan(
            model="shown",
            layers_per_stage=(layers,),
            embedding=ends,
            layers=(ends, *[inner] * (layers - 1)),
            head=ends,
            **sizes,
        )
        for name, (ends, inner) in kinds.items()
    }


def check_exported(shown: Shown, folder: Path, path: Path) -> float:
    """The last value of the metric, whose loss is what transformers says of ``exported``."""
    rows = [row for row in read_metrics(folder / "runs" / shown.name / "metrics.jsonl") if shown.loss in row]
    loss, accuracy = evaluated_by_transformers(folder / "exported", Job.load(path), folder / "again")
    assert rows[-1][shown.loss] == pytest.approx(loss, rel=1e-5)
    if shown.metric.endswith("accuracy"):
        assert rows[-1][shown.metric] == pytest.approx(accuracy)
    return float(rows[-1][shown.metric])
