"""Every command that README, docs and help show exists, and those that start no processes run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import typer.main

from documented import ROOT, commands, furnish, mentions, small, verbs
from galvatron.cli import app, main

SHOWN = commands()
DECIDING = [command for command in SHOWN if re.match(r"galvatron (search|plan|import) ", command)]
LONG = ("llama3.1-405b", "mixtral-8x7b", "--what-if", "--space all")  # seconds of search: with the slow tests


def test_all_of_them_are_found() -> None:
    assert len(SHOWN) > 30
    for words, _ in verbs():
        assert any(command.startswith("galvatron " + " ".join(words)) for command in SHOWN), words


@pytest.mark.parametrize("command", SHOWN)
def test_a_shown_command_can_be_parsed(command: str) -> None:
    words = shlex.split(command)
    if "galvatron" in words:
        _parse(typer.main.get_command(app), words[words.index("galvatron") + 1 :])
    elif words[0] == "make":
        subprocess.run(["make", "-n", "-C", str(ROOT), words[1]], check=True, capture_output=True)
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert all(extra in extras for extra in re.findall(r"\[(\w+)\]", command))


def _parse(command: click.Command, arguments: list[str]) -> None:
    if hasattr(command, "commands"):
        assert arguments[0] in command.commands, arguments
        _parse(command.commands[arguments[0]], arguments[1:])
    else:
        command.make_context("galvatron", list(arguments))


@pytest.mark.parametrize("mention", mentions())
def test_a_mentioned_verb_and_its_options_exist(mention: str) -> None:
    words = mention.split()[1:]
    known = {path: {name for option in verb.params for name in option.opts} for path, verb in verbs()}
    first = words[0]
    others = words[1].split("|") if len(words) > 1 else [""]
    for other in others:
        path = next((path for path in ((first, other), (first,)) if any(k[: len(path)] == path for k in known)), None)
        assert path is not None, mention
        for option in re.findall(r"--[\w-]+", mention):
            assert any(option in options for k, options in known.items() if k[: len(path)] == path), option


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=[pytest.mark.slow] if any(word in c for word in LONG) else []) for c in DECIDING],
)
def test_a_shown_command_of_the_deciding_half_runs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", small(command))
    with pytest.raises(SystemExit) as stop:
        main()
    assert (stop.value.code or 0) == 0, capsys.readouterr().err
