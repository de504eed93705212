"""``galvatron search`` on made-up profiles, without processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from galvatron.cli import main
from galvatron.cli.search import runner_up
from galvatron.plan import Plan
from galvatron.search import search
from unit.profiles import make_hardware, make_model, make_spec

ARGUMENTS = ("search", "--model", "model.json", "--hardware", "hardware.json", "--global-batch-size", "8")


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_model(make_spec(4, hidden=256, ffn=768, vocab=2000), flops_per_s=2e11).save(tmp_path / "model.json")
    make_hardware(4).save(tmp_path / "hardware.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def galvatron(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["galvatron", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_it_writes_and_explains_a_plan(
    profiles: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert galvatron(monkeypatch, *ARGUMENTS, "--memory", "30MiB") == 0
    out = capsys.readouterr().out
    plan = Plan.load("plan.json")
    assert plan.prediction is not None
    assert plan.prediction.peak_memory_bytes <= 30 * 2**20
    for line in plan.describe().splitlines():
        assert line in out
    assert "wrote plan.json" in out
    assert Path("plan.svg").read_text().startswith("<svg")


def test_a_pipeline_is_drawn(
    profiles: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert galvatron(monkeypatch, *ARGUMENTS, "--pp", "2") == 0
    assert "  stage 1  " in capsys.readouterr().out


def test_json_is_the_plan_and_nothing_else(
    profiles: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert galvatron(monkeypatch, *ARGUMENTS, "--pp", "2", "--out", "two.json", "--json") == 0
    out = capsys.readouterr().out
    assert json.loads(out) == json.loads(Path("two.json").read_text())
    assert len(json.loads(out)["layers_per_stage"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "1MiB"], "no plan fits in 1.0 MiB a device"),
        (["--memory", "lots"], "a memory size is a number with a unit, got 'lots'"),
        (["--pp", "3"], "pp=3 must divide world_size=4; choose 1, 2, 4"),
        (["--seq-len", "128"], "the model profile was measured at seq_len=64 but the job has seq_len=128"),
        (["--hardware", "none.json"], "none.json does not exist"),
        (["--hardware", "model.json"], 'model.json lacks "format": "galvatron.hardware"'),
    ],
)
def test_what_cannot_be_is_one_sentence_and_no_plan(
    profiles: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert galvatron(monkeypatch, *ARGUMENTS, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (profiles / "plan.json").exists()


def test_the_runner_up_differs_in_more_than_microbatches(profiles: Path) -> None:
    result = search(make_model(), make_hardware(4), global_batch_size=8)
    other = runner_up(result)
    assert other is not None
    assert (other.layers_per_stage, other.layers) != (result.plan.layers_per_stage, result.plan.layers)


def test_help_has_examples(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["search"], ["train"], ["run"], ["profile", "hardware"], ["profile", "model"], ["convert", "to-hf"]):
        assert galvatron(monkeypatch, *verb, "--help") == 0
        assert f"Examples:\n    galvatron {' '.join(verb)} " in capsys.readouterr().out
