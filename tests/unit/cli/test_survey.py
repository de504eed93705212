"""A survey of types: a process each, a line each, and a page."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from galvatron.cli import survey
from galvatron.core.errors import ConfigError
from galvatron.parallelize import verdict
from galvatron.parallelize.verdict import Verdict


def _judged(model_type: str, transformers: str) -> Verdict:
    if model_type == "bloom":
        os._exit(1)
    lacks = ("tp",) if model_type == "falcon" else ()
    return Verdict(model_type=model_type, lacks=lacks, why="no rule" if lacks else "", transformers=transformers)


def test_a_survey_goes_on_from_its_lines_and_survives_what_ends_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, page = tmp_path / "types.jsonl", tmp_path / "types.md"
    monkeypatch.setattr(verdict, "judge", _judged)
    survey.survey(["llama", "falcon"], lines)
    kept = lines.read_text()
    assert len(kept.splitlines()) == 2
    monkeypatch.setattr(survey, "_started", _refuses("llama", survey._started))
    survey.survey(["llama", "falcon", "bloom"], lines, page)
    assert lines.read_text().startswith(kept)
    text = page.read_text()
    assert "finds of 3 of the " in text
    assert "1 with every strategy, 0 with data, pipeline and tensor parallelism, 1 with fewer, 1 refused" in text
    assert "| every strategy | llama |" in text
    assert "| no tp: no rule | falcon |" in text
    assert "| refused: ends its process | bloom |" in text


def _refuses(known: str, started: object) -> object:
    def start(context: object, model_type: str, version: str) -> object:
        assert model_type != known
        return started(context, model_type, version)  # type: ignore[operator]

    return start


def test_what_is_no_type_of_a_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no task for the type"):
        survey.survey(["lama"], tmp_path / "types.jsonl")


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    lines = tmp_path / "types.jsonl"
    lines.write_text("{}\n")
    with pytest.raises(ConfigError, match=r"types.jsonl, line 1: "):
        survey.survey(["llama"], lines)
