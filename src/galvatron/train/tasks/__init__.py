"""What is trained on: one record a task, with its inputs by name and how each is cut, and one file that makes them.

A task's samples are ``data.Samples``: numbered, of one shape, and whatever is random in one comes from its draw alone,
so that every plan and every resume sees the same.  Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from galvatron.core.tasks import Task

from .answered import AnsweredTexts
from .classes import LabelledTexts
from .images import Augmentation, LabelledImages, Picture, TitledImages
from .masked import MaskedRows
from .sounds import Ear, Sound, ToldSounds
from .spans import SpanRows
from .told import ImageTokens, ToldGrids, ToldImages

__all__ = [
    "INPUTS",
    "AnsweredTexts",
    "Augmentation",
    "Ear",
    "ImageTokens",
    "Input",
    "LabelledImages",
    "LabelledTexts",
    "MaskedRows",
    "Picture",
    "Sound",
    "SpanRows",
    "TaskInputs",
    "TitledImages",
    "ToldGrids",
    "ToldImages",
    "ToldSounds",
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
class TaskInputs:
    """The inputs of a task's batches; those of ``optional`` are there for some sources alone."""

    task: Task
    inputs: tuple[Input, ...]
    optional: tuple[Input, ...] = ()


def _tokens(name: str, length: str = "sequence") -> Input:
    return Input(name, torch.int64, ("batch", length), "batch and sequence")


def _whole(name: str) -> Input:
    return Input(name, torch.int64, ("batch", "sequence"), "batch")


_PIXELS = Input("pixel_values", torch.float32, ("batch", "channels", "height", "width"), "batch")
_CLASS = Input("labels", torch.int64, ("batch",), "batch")
_TEXT = (_whole("input_ids"), _whole("attention_mask"))

INPUTS: dict[Task, TaskInputs] = {
    given.task: given
    for given in (
        TaskInputs("causal_lm", (_tokens("input_ids"), _tokens("labels")), (_tokens("position_ids"),)),
        TaskInputs("masked_lm", (_tokens("input_ids"), _tokens("labels"))),
        TaskInputs(
            "seq2seq_lm",
            (_tokens("input_ids"), _tokens("decoder_input_ids", "target"), _tokens("labels", "target")),
            (_whole("attention_mask"),),
        ),
        TaskInputs(
            "speech_to_text",
            (
                Input("input_features", torch.float32, ("batch", "bins", "frames"), "batch"),
                _tokens("decoder_input_ids", "target"),
                _tokens("labels", "target"),
            ),
        ),
        TaskInputs("text_classification", (*_TEXT, _CLASS)),
        TaskInputs("image_classification", (_PIXELS, _CLASS)),
        TaskInputs("contrast", (_PIXELS, _TEXT[0]), (_TEXT[1],)),
        TaskInputs("vision_language", (_PIXELS, _whole("input_ids"), _whole("labels"))),
    )
}
"""By task.  Labels of -100 do not count; those of ``causal_lm`` are shifted by one already."""
