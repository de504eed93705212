"""What a model is trained for: its task."""

from __future__ import annotations

from typing import Literal, get_args

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
