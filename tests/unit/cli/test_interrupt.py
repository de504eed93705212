"""Ctrl-C gives the best plan so far; where there is none it is said in one line, with exit code 130."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from galvatron.cli import main
from unit.profiles import make_hardware, make_model


def search(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    make_model().save(folder / "model.json")
    make_hardware(4).save(folder / "hardware.json")
    monkeypatch.chdir(folder)
    files = ("--model", "model.json", "--cluster", "hardware.json")
    monkeypatch.setattr(sys, "argv", ["galvatron", "search", *files, "--global-batch-size", "8", *more])
    main()


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_two_interrupts_before_any_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("galvatron.search.engine.solve", interrupt)
    with pytest.raises(SystemExit) as stop:
        search(tmp_path, monkeypatch)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "galvatron: interrupted\n"
    assert not (tmp_path / "plan.json").exists()


def test_an_interrupt_while_tasks_are_bounded_gives_some_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("galvatron.search.job.lower_bounds_s", interrupt)
    with pytest.raises(SystemExit) as stop:
        search(tmp_path, monkeypatch, "--json")
    assert stop.value.code == 0
    out = json.loads(capsys.readouterr().out)
    assert out["search"]["stopped"] == "interrupt"
    assert 0 < out["proof"]["gap"] < 1
    assert out["plan"] == json.loads((tmp_path / "plan.json").read_text())
