"""What is trained on: one record a task, with its inputs by name and how each is cut, and one file that makes them.

A task's samples are ``data.Samples``: numbered, of one shape, and whatever is random in one comes from its draw alone,
so that every plan and every resume sees the same.  Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .classes import LabelledTexts
from .images import Augmentation, LabelledImages, TitledImages
from .masked import MaskedRows
from .pictures import Picture, check_pictures, find_pictures
from .spans import SpanRows

__all__ = [
    "TASKS",
    "Augmentation",
    "Input",
    "LabelledImages",
    "LabelledTexts",
    "MaskedRows",
    "Picture",
    "SpanRows",
    "Task",
    "TitledImages",
    "check_pictures",
    "find_pictures",
]


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor of a batch.

    Attributes:
        shape: by names; the first dim is always the batch.
        cut: what ranks may take a part of.  ``batch``: samples alone, a rank has the rest of each whole.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[str, ...]
    cut: Literal["batch", "batch and sequence"]


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of training, by the inputs of its batches; those after ``optional`` are there for some sources alone."""

    name: str
    inputs: tuple[Input, ...]
    optional: tuple[Input, ...] = ()


def _tokens(name: str, length: str = "sequence") -> Input:
    return Input(name, torch.int64, ("batch", length), "batch and sequence")


_PIXELS = Input("pixel_values", torch.float32, ("batch", "channels", "height", "width"), "batch")
_CLASS = Input("labels", torch.int64, ("batch",), "batch")
_TEXT = (
    Input("input_ids", torch.int64, ("batch", "sequence"), "batch"),
    Input("attention_mask", torch.int64, ("batch", "sequence"), "batch"),
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("causal_lm", (_tokens("input_ids"), _tokens("labels")), (_tokens("position_ids"),)),
        Task("masked_lm", (_tokens("input_ids"), _tokens("labels"))),
        Task("span_corruption", (_tokens("input_ids"), _tokens("labels", "target"))),
        Task("text_classification", (*_TEXT, _CLASS)),
        Task("image_classification", (_PIXELS, _CLASS)),
        Task("image_text", (_PIXELS, *_TEXT)),
    )
}
"""By name.  Labels of -100 do not count; those of ``causal_lm`` are shifted by one already."""
