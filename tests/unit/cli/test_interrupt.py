"""Ctrl-C is said in one line, with the exit code that shells know."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from galvatron.cli import main
from unit.profiles import make_hardware, make_model


def test_an_interrupt_before_any_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model().save(tmp_path / "model.json")
    make_hardware(4).save(tmp_path / "hardware.json")
    monkeypatch.chdir(tmp_path)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("galvatron.search.engine.solve", interrupted)
    files = ("--model", "model.json", "--cluster", "hardware.json")
    monkeypatch.setattr(sys, "argv", ["galvatron", "search", *files, "--global-batch-size", "8"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "galvatron: interrupted\n"
    assert not (tmp_path / "plan.json").exists()
