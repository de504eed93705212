"""Verdicts on types: a rule that many share, and what was seen of one."""

from __future__ import annotations

import pytest

from galvatron.core.errors import UnfitError
from galvatron.parallelize import verdict
from galvatron.parallelize.proof import Finding, Proof
from galvatron.parallelize.verdict import judge

OTHER = Finding("differs", detail="the loss is 1, not 2")


@pytest.mark.parametrize(
    ("proof", "lacks", "why", "detail"),
    [
        (Proof(), (), "", ""),
        (Proof(tp=Finding("unfit", "no rule fits: its linears")), ("tp",), "no rule fits: its linears", ""),
        (
            Proof(tp=Finding("fails", detail="ValueError (the loss is: odd)"), pp=OTHER),
            ("pp", "tp"),
            "in stages it computes something else; cut in two it fails",
            "the loss is 1, not 2; ValueError (the loss is: odd)",
        ),
        (Proof(whole=OTHER), None, "driven by galvatron it computes something else", "the loss is 1, not 2"),
        (Proof(whole=Finding("differs", "its attention is another", "it")), None, "its attention is another", "it"),
        (Proof(whole=Finding("unfit", "it fails with none")), None, "it fails with none", ""),
    ],
)
def test_a_proof_is_told_by_its_rules(
    proof: Proof, lacks: tuple[str, ...] | None, why: str, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "prove", lambda config: proof)
    found = judge("llama", "5")
    assert (found.lacks, found.refused, found.why, found.detail) == (lacks or (), lacks is None, why, detail)


def test_a_refusal_is_told_without_the_type_that_it_names_and_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: object) -> None:
        raise UnfitError("inner", "is built (so) otherwise", "choose another", "a list (of two); of one")

    monkeypatch.setattr(verdict, "family_of", refuse)
    found = judge("llama", "5")
    assert (found.refused, found.why, found.detail) == (True, "is built (so) otherwise", "a list (of two); of one")


def test_a_config_that_cannot_be_read_is_told_by_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(model_type: str) -> None:
        raise KeyError(model_type)

    monkeypatch.setattr(verdict, "usual_config", read)
    found = judge("llama", "5")
    assert (found.refused, found.why, found.detail) == (True, "has a config that cannot be read", "KeyError ('llama')")
