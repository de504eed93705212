"""What galvatron makes of a type of model: works, works under fewer strategies, or refused; and why.

Takes the name of a type; gives a Verdict.  A type is checked by its own config's structure, for the task that it is
known for.
"""

from __future__ import annotations

from typing import Literal

from transformers import PretrainedConfig

from galvatron.core.errors import GalvatronError
from galvatron.core.family import Family
from galvatron.core.records import Record
from galvatron.core.tasks import Task
from galvatron.models import family_of, task_of
from galvatron.models.types import usual_config

from .proof import prove

Lacking = Literal["pp", "tp", "ulysses", "ring"]
ACROSS: tuple[Lacking, Lacking] = ("ulysses", "ring")


class Verdict(Record):
    """Of ``model_type``: the strategies that it ``lacks`` and why; or why it is ``refused``."""

    model_type: str
    task: Task | None = None
    lacks: tuple[Lacking, ...] = ()
    why: str = ""
    refused: bool = False
    transformers: str


def judge(model_type: str, transformers: str) -> Verdict:
    """The verdict on a type, with ``transformers`` of this version."""
    task = None
    try:
        config = usual_config(model_type)
        task = task_of(config)
        lacks, why = _lacking(config, family_of(config))
    except GalvatronError as refusal:
        return _refused(model_type, transformers, task, _why(model_type, refusal))
    except Exception as failure:  # of any kind: foreign configs are read
        why = f"is described in no way that is known ({type(failure).__name__})"
        return _refused(model_type, transformers, task, why)
    if lacks is None:
        return _refused(model_type, transformers, task, why)
    return Verdict(model_type=model_type, task=task, lacks=lacks, why=why, transformers=transformers)


def _lacking(config: PretrainedConfig, family: Family) -> tuple[tuple[Lacking, ...] | None, str]:
    """What cannot be done to a model, and why; None if nothing can."""
    proof = prove(config)
    if proof.whole is not None:
        return None, f"is not computed right: {proof.whole}"
    lacks: list[Lacking] = []
    reasons = []
    if len(family.stacks) > 1:
        lacks.append("ring")
        reasons.append("several stacks")
    if proof.pp is not None:
        lacks.append("pp")
        reasons.append(proof.pp)
    if proof.tp is not None:
        lacks.append("tp")
        reasons.append(proof.tp)
    if not family.asks_for_attention:
        lacks += ACROSS
        reasons.append("attends by itself")
    return tuple(dict.fromkeys(lacks)), "; ".join(reasons)


def _refused(model_type: str, transformers: str, task: Task | None, why: str) -> Verdict:
    return Verdict(model_type=model_type, task=task, why=why, refused=True, transformers=transformers)


def _why(model_type: str, refusal: GalvatronError) -> str:
    """The rule of a sentence alone: without the type that it names and the remedy."""
    return str(refusal).removeprefix(f"model_type={model_type!r} ").rpartition("; ")[0]
