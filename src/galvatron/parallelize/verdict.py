"""What galvatron makes of a type of model: works, works under fewer strategies, or refused; and why.

Takes the name of a type; gives a Verdict.  A type is checked by its own config's structure, for the task that it is
known for.
"""

from __future__ import annotations

from typing import Literal

from transformers import PretrainedConfig

from galvatron.core.family import Family
from galvatron.core.records import Record
from galvatron.core.tasks import Task
from galvatron.models import family_of, task_of
from galvatron.models.types import usual_config

from .proof import Finding, prove

Lacking = Literal["pp", "tp", "ulysses", "ring"]
OUTCOMES = {"fails": "fails", "differs": "computes something else"}


class Verdict(Record):
    """Of ``model_type``: the strategies that it ``lacks`` and why; or why it is ``refused``.

    ``why``: a rule, the same for all types that it holds for; ``detail``: what was seen of this one.
    """

    model_type: str
    task: Task | None = None
    lacks: tuple[Lacking, ...] = ()
    why: str = ""
    detail: str = ""
    refused: bool = False
    transformers: str


def judge(model_type: str, transformers: str) -> Verdict:
    """The verdict on a type, with ``transformers`` of this version."""
    task = None
    try:
        config = usual_config(model_type)
        task = task_of(config)
        lacks, found = _lacking(config, family_of(config))
    except Exception as failure:  # of any kind: foreign configs are read
        refusal = Finding.of(failure)
        lacks, found = None, [(refusal.rule or "has a config that cannot be read", refusal.detail)]
    return Verdict(
        model_type=model_type,
        task=task,
        lacks=lacks or (),
        why="; ".join(dict.fromkeys(rule for rule, _ in found)),
        detail="; ".join(dict.fromkeys(detail for _, detail in found if detail)),
        refused=lacks is None,
        transformers=transformers,
    )


Reason = tuple[str, str]
"""A rule, and what was seen."""


def _lacking(config: PretrainedConfig, family: Family) -> tuple[tuple[Lacking, ...] | None, list[Reason]]:
    """What cannot be done to a model, and why; None if nothing can."""
    proof = prove(config)
    if proof.whole is not None:
        return None, [_reason("driven by galvatron it", proof.whole)]
    several = Finding("unfit", "several stacks") if len(family.stacks) > 1 else None
    by_itself = None if family.asks_for_attention else Finding("unfit", "attends by itself")
    checks: list[tuple[tuple[Lacking, ...], str, Finding | None]] = [
        (("ring",), "", several),
        (("pp",), "in stages it", proof.pp),
        (("tp",), "cut in two it", proof.tp),
        (("ulysses", "ring"), "", by_itself),
    ]
    lacks = dict.fromkeys(name for names, _, found in checks if found is not None for name in names)
    return tuple(lacks), [_reason(way, found) for _, way, found in checks if found is not None]


def _reason(way: str, found: Finding) -> Reason:
    """What a proof found of a way to run a model."""
    return found.rule or f"{way} {OUTCOMES[found.kind]}", found.detail
