"""What galvatron makes of a type of model: works, works under fewer strategies, or refused; and why.

Takes the name of a type; gives a Verdict.  A type is checked by its own config's structure, for the task that it is
known for.
"""

from __future__ import annotations

import re
from typing import Literal

from transformers import PretrainedConfig

from galvatron.core.errors import GalvatronError
from galvatron.core.family import Family
from galvatron.core.records import Record
from galvatron.core.tasks import Task
from galvatron.models import family_of, task_of
from galvatron.models.failures import FAILS, said
from galvatron.models.types import usual_config

from .proof import is_other, prove

Lacking = Literal["pp", "tp", "ulysses", "ring"]
ACROSS: tuple[Lacking, Lacking] = ("ulysses", "ring")


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
    except GalvatronError as refusal:
        lacks, found = None, [_rule_of(refusal)]
    except Exception as failure:  # of any kind: foreign configs are read
        lacks, found = None, [("has a config that cannot be read", said(failure))]
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
    lacks: list[Lacking] = []
    reasons: list[Reason] = []
    if len(family.stacks) > 1:
        lacks.append("ring")
        reasons.append(("several stacks", ""))
    if proof.pp is not None:
        lacks.append("pp")
        reasons.append(_reason("in stages it", proof.pp))
    if proof.tp is not None:
        lacks.append("tp")
        reasons.append(_reason("cut in two it", proof.tp))
    if not family.asks_for_attention:
        lacks += ACROSS
        reasons.append(("attends by itself", ""))
    return tuple(dict.fromkeys(lacks)), reasons


def _reason(way: str, found: str) -> Reason:
    """What a proof found of a way to run a model."""
    if found.startswith(FAILS):
        return f"{way} fails", found.removeprefix(FAILS)
    if not is_other(found):
        return found, ""
    rule, _, seen = found.rpartition(": ")
    return rule or f"{way} computes something else", seen


def _rule_of(refusal: GalvatronError) -> Reason:
    """The rule of a sentence alone, without the type that it names and the remedy, and what it says in brackets."""
    rule = re.sub(r"^model_type='[^']*' ", "", str(refusal).rpartition("; ")[0])
    rule, _, detail = rule.partition(" (")
    return rule, detail.removesuffix(")")
