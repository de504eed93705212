"""``galvatron search`` on made-up profiles, without processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from galvatron.cli.inputs import batch_sizes, tp_degrees
from galvatron.cli.search import limits_of
from galvatron.core.job import SearchSection
from galvatron.plan import Plan
from galvatron.search.layers import Effort
from galvatron.search.patience import Patience
from galvatron.search.solve import Solved, solve
from galvatron.search.space import Space
from unit.profiles import make_hardware, make_model, make_spec

ARGUMENTS = ("search", "--model", "model.json", "--hardware", "hardware.json", "--global-batch-size", "8")

Verb = Callable[..., int]


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_model(make_spec(4, hidden=256, ffn=768, vocab=2000), flops_per_s=2e11).save(tmp_path / "model.json")
    make_hardware(4).save(tmp_path / "hardware.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_writes_and_explains_a_plan(profiles: Path, galvatron: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    assert galvatron(*ARGUMENTS, "--memory", "30MiB") == 0
    out = capsys.readouterr().out
    plan = Plan.load("plan.json")
    assert plan.prediction is not None
    assert plan.prediction.peak_memory_bytes <= 30 * 2**20
    for line in plan.describe().splitlines():
        assert line in out
    assert "wrote plan.json" in out
    assert Path("plan.svg").read_text().startswith("<svg")


def test_a_pipeline_is_drawn(profiles: Path, galvatron: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    assert galvatron(*ARGUMENTS, "--fix", "pp=2") == 0
    assert "  stage 1  " in capsys.readouterr().out


def test_json_is_one_object_and_nothing_else(
    profiles: Path, galvatron: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--fix", "pp=2", "--memory", "40MiB", "--out", "two.json", "--json", "--what-if")
    assert galvatron(*ARGUMENTS, *options) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["plan"] == json.loads(Path("two.json").read_text())
    assert len(out["plan"]["layers_per_stage"]) == len(out["predicted"]["peak_memory_bytes"]) == 2
    assert out["predicted"]["memory_limit_bytes"] == 40 * 2**20
    assert out["search"]["origins"] == {"model": "measured", "hardware": "measured"}
    assert [change["change"] for change in out["sensitivity"]] == ["another 8 GiB a device"]


CARD = ("search", "--model", "llama2-7b", "--cluster", "a100:1x8", "--global-batch-size", "64")


def test_a_card_on_a_preset_is_planned_without_torch(tmp_path: Path) -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'datasets', 'safetensors']))"
    code = f"{blocked}; from galvatron.cli import main; main()"
    command = [sys.executable, "-c", code, *CARD, "--seq-len", "4096", "--memory", "60GiB", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    out = json.loads(done.stdout)
    assert out["search"]["origins"] == {"model": "estimated", "hardware": "estimated"}
    assert out["plan"]["precision"] == "bf16"
    assert out["predicted"]["tokens_per_s"] == pytest.approx(64 * 4096 / out["predicted"]["step_time_s"])
    assert max(out["predicted"]["peak_memory_bytes"]) <= 60 * 2**30
    assert done.stderr == ""


def test_estimates_are_called_so(
    tmp_path: Path, galvatron: Verb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert galvatron(*CARD, "--seq-len", "4096", "--no-baselines") == 0
    out = capsys.readouterr().out
    assert "tokens/s (predicted from estimated profiles, layers compiled)" in out
    assert "Simple plans" not in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs the tokens of a sequence, at most 4096 for llama2-7b; give --seq-len 4096"),
        (["--model", "t5-3b"], "needs the tokens of a sequence, any number for t5-3b; give --seq-len 512"),
        (["--seq-len", "8192"], "seq_len=8192 must be from 1 to max_seq_len=4096 of llama2-7b"),
        (["--seq-len", "64", "--cluster", "abacus:1x8"], "no device is called 'abacus'; choose one of a100"),
        (["--seq-len", "64", "--cluster", "a100"], "a cluster is device:nodesxdevices, got 'a100'; write h100:16x8"),
        (["--seq-len", "64", "--link", "inter=fast"], "got 'inter=fast'; write inter=50GB/s"),
        (["--seq-len", "64", "--model", "llama9"], "'llama9' is no card, no config.json"),
        (["--seq-len", "64", "--global-batch-size", "512-64"], "got '512-64'; write 64, 64-512 or 64,96,128"),
        (["--seq-len", "64", "--space", "small"], "--space 'small' is not known; choose from runtime, all"),
        (["--seq-len", "64", "--fix", "pp"], "'pp' is no dimension=value; dimensions: schedule, pp"),
        (
            ["--seq-len", "4096", "--memory", "8GiB", "--cluster", "a100:1x4"],
            "on stage 0, 20.4 GiB too much; allow 28.36 GiB, take",
        ),
    ],
)
def test_what_cannot_be_estimated_is_one_sentence(
    tmp_path: Path,
    galvatron: Verb,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert galvatron(*CARD, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_nodes_that_would_do_are_named(
    tmp_path: Path, galvatron: Verb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert galvatron(*CARD, "--cluster", "a100:1x1", "--seq-len", "4096") == 2
    assert "; a100-80g:2x1 would do" in capsys.readouterr().err


def test_an_interrupt_gives_the_best_plan_so_far(
    profiles: Path, galvatron: Verb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    solved: list[Solved] = []

    def interrupted(space: Space, at_most: float, effort: Effort, patience: Patience) -> Solved:
        if solved:
            raise KeyboardInterrupt
        solved.append(solve(space, at_most, effort, patience))
        return solved[0]

    monkeypatch.setattr("galvatron.search.engine.solve", interrupted)
    assert galvatron(*ARGUMENTS, "--json", "--what-if") == 0
    out = json.loads(capsys.readouterr().out)
    assert out["search"]["stopped"] == "interrupt"
    assert 0 <= out["proof"]["gap"] < 1
    assert out["plan"] == json.loads(Path("plan.json").read_text())
    assert "sensitivity" not in out


@pytest.mark.parametrize(
    ("text", "sizes"), [("64", [64]), ("64-512", [64, 128, 256, 512]), ("96-200", [96, 192]), ("128,64", [64, 128])]
)
def test_batches_are_a_number_a_range_or_a_list(text: str, sizes: list[int]) -> None:
    assert batch_sizes(text) == sizes


def test_tp_degrees_are_those_of_some_stage() -> None:
    assert tp_degrees(8, 64) == [1, 2, 4, 8]
    assert tp_degrees(12, 64) == [1, 2, 3, 4, 6, 12]
    assert tp_degrees(1024, 64)[-1] == 64


def test_a_job_s_limits_reach_the_search() -> None:
    limits = limits_of(SearchSection(pp=2, max_tp=4))
    assert (limits.space, limits.fix, limits.at_most) == ("runtime", {"pp": 2}, {"tp": 4})
    assert limits_of(SearchSection(num_microbatches=8)).fix == {"num_microbatches": 8}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "1MiB"], "no plan fits in 1.0 MiB a device"),
        (["--gap", "0.01"], "a gap is a percentage below 100, got '0.01'; write 1% or 0.1%"),
        (["--gap", "100%"], "a gap is a percentage below 100"),
        (["--time-limit", "30"], "a time is a positive number with a unit, got '30'; write 30s, 5m or 1h"),
        (["--time-limit", "0s"], "a time is a positive number"),
        (["--memory", "lots"], "a memory size is a number with a unit, got 'lots'"),
        (["--fix", "pp=3"], "pp=3 must divide world_size=4; choose 1, 2, 4"),
        (["--seq-len", "128"], "the model profile was measured at seq_len=64 but the job has seq_len=128"),
        (["--hardware", "none.json"], "none.json does not exist"),
        (["--hardware", "hardware.json", "--link", "inter=1GB/s"], "is for presets, but hardware.json is a file"),
        (["--model", "hardware.json"], 'hardware.json lacks "format": "galvatron.model"'),
        (["--hardware", "model.json"], 'model.json lacks "format": "galvatron.hardware"'),
    ],
)
def test_what_cannot_be_is_one_sentence_and_no_plan(
    profiles: Path, galvatron: Verb, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert galvatron(*ARGUMENTS, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (profiles / "plan.json").exists()


def test_help_has_examples(galvatron: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["search"], ["train"], ["run"], ["profile", "hardware"], ["profile", "model"], ["convert", "to-hf"]):
        assert galvatron(*verb, "--help") == 0
        assert f"Examples:\n    galvatron {' '.join(verb)} " in capsys.readouterr().out
