"""What a model is trained for: its task."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from .errors import ConfigError

Task = Literal[
    "causal_lm",
    "masked_lm",
    "seq2seq_lm",
    "speech_to_text",
    "text_classification",
    "image_classification",
    "contrast",
    "vision_language",
]
Ends = Literal["tokens", "whole"]
"""What embedding and head see of a sequence on a rank: tokens of it, or all."""
TASKS: tuple[Task, ...] = get_args(Task)
TOKEN_TASKS: frozenset[Task] = frozenset({"causal_lm", "masked_lm", "seq2seq_lm", "speech_to_text", "vision_language"})
"""Those with a label for every token, int64 [batch, sequence]; the others have one for every sample, [batch]."""
CLASSIFICATION: frozenset[Task] = frozenset({"text_classification", "image_classification"})
"""Those whose head gives a sample its classes."""
WITH_IMAGES: frozenset[Task] = frozenset({"image_classification", "contrast", "vision_language"})
"""Those whose samples have an image."""
WITH_MEDIA: frozenset[Task] = WITH_IMAGES | {"speech_to_text"}
"""Those whose samples have an image or a sound, which a processor reads."""
ENDINGS: dict[str, Task] = {
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForMaskedLM": "masked_lm",
    "ForSequenceClassification": "text_classification",
    "ForImageClassification": "image_classification",
}
"""How the names of architectures end."""


OF_THE_TYPE = ("ForConditionalGeneration", "ForImageTextToText", "ForPreTraining")
"""How those of several tasks end: the type says which."""
_HEAD = re.compile(r"For[A-Z]\w*$")


def task_named(config: Mapping[str, Any]) -> Task | None:
    """The task of the architecture that a ``config.json`` names; None where its type says it, or no head is named.

    Raises:
        ConfigError: the architecture has a head of no task.
    """
    named = config.get("architectures")
    first = str(named[0]) if isinstance(named, (list, tuple)) and named else ""
    check_head(first)
    return next((task for ending, task in ENDINGS.items() if first.endswith(ending)), None)


def check_head(architecture: str) -> None:
    """Raise ConfigError if the name of an ``architecture`` says that it has a head of no task."""
    head = _HEAD.search(architecture)
    if head is not None and not head[0].startswith((*ENDINGS, *OF_THE_TYPE)):
        raise ConfigError(
            f"architectures names {architecture}, whose head is of none of the tasks {', '.join(TASKS)}; name one of "
            "them with --task, or as model.task in a job, to train another head on the same layers"
        )
