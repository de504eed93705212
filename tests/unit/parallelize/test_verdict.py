"""Verdicts on types: a rule that many share, and what was seen of one."""

from __future__ import annotations

import pytest

from galvatron.core.errors import ConfigError
from galvatron.parallelize import verdict
from galvatron.parallelize.proof import Proof
from galvatron.parallelize.verdict import judge


@pytest.mark.parametrize(
    ("proof", "lacks", "why", "detail"),
    [
        (Proof(), (), "", ""),
        (Proof(tp="no rule fits its linears"), ("tp",), "no rule fits its linears", ""),
        (
            Proof(tp="it fails with ValueError (odd)", pp="the loss is 1, not 2"),
            ("pp", "tp"),
            "in stages it computes something else; cut in two it fails",
            "the loss is 1, not 2; ValueError (odd)",
        ),
        (Proof(whole="the loss is 1, not 2"), None, "driven by galvatron it computes something else", "the loss is 1"),
        (Proof(whole="its eager attention is another: the loss is 1"), None, "its eager attention is another", "the"),
        (Proof(whole="it has no gradients"), None, "it has no gradients", ""),
    ],
)
def test_a_proof_is_told_by_its_rules(
    proof: Proof, lacks: tuple[str, ...] | None, why: str, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "prove", lambda config: proof)
    found = judge("llama", "5")
    assert (found.lacks, found.refused, found.why) == (lacks or (), lacks is None, why)
    assert found.detail.startswith(detail)
    assert bool(found.detail) == bool(detail)


def test_a_refusal_is_told_without_the_type_that_it_names_and_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: object) -> None:
        raise ConfigError("model_type='inner' is built otherwise (a list (of two)); choose another")

    monkeypatch.setattr(verdict, "family_of", refuse)
    found = judge("llama", "5")
    assert (found.refused, found.why, found.detail) == (True, "is built otherwise", "a list (of two)")
