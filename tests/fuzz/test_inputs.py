"""Six kinds of files under 5,000 mutations each; the first few of them in every run of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz.harness import run
from fuzz.kinds import KINDS, kind

SAMPLED = 60
ALL = 5000


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_one_sentence_or_right(name: str, tmp_path: Path) -> None:
    outcome = run(kind(name, tmp_path), SAMPLED, tmp_path)
    assert outcome.refused > 0
    assert outcome.refused + outcome.accepted == SAMPLED


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", KINDS)
def test_five_thousand_mutations(name: str, tmp_path: Path) -> None:
    outcome = run(kind(name, tmp_path), ALL, tmp_path)
    print(f"{name}: {ALL} mutations, {outcome.refused} refused, {outcome.accepted} accepted")
    assert outcome.refused > 0
    assert outcome.accepted > 0
