"""The samples of a task: one function a kind, from a job's data and the config of the model that learns from them.

Knows nothing of batches and ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PretrainedConfig

from galvatron.core.errors import DataError
from galvatron.core.job import DataSection
from galvatron.core.tasks import Task
from galvatron.models.grids import GRIDS, PIXELS, Grids
from galvatron.models.images import image_length, image_token
from galvatron.models.inputs import input_shapes, words_of

from .chat import ChatTemplate
from .data import Samples
from .processing import load_extractor, load_processor
from .rows import DocumentRows, StreamRows
from .tasks import (
    AnsweredTexts,
    Augmentation,
    Ear,
    ImageTokens,
    LabelledImages,
    LabelledTexts,
    MaskedRows,
    Picture,
    Sound,
    SpanRows,
    TitledImages,
    ToldGrids,
    ToldImages,
    ToldSounds,
)
from .tasks.answered import ended
from .tasks.classes import Class, Numbering
from .tasks.media import Fields, M
from .text import Block, Skipped, reader
from .tokenizer import Tokenizer, load_tokenizer
from .tokens import Encoder

RECORDS: dict[Task, tuple[str, ...]] = {
    "causal_lm": ("text", "conversations", "pairs"),
    "masked_lm": ("text",),
    "seq2seq_lm": ("text", "pairs"),
    "speech_to_text": ("text",),
    "text_classification": ("text",),
    "image_classification": ("text",),
    "contrast": ("text",),
    "vision_language": ("text", "conversations", "pairs"),
}
"""What records may be, by the task of the jobs that take them; images and sounds have these texts beside them."""


@dataclass(frozen=True)
class Loaded:
    """Samples; below which number their ids or classes are; what tells them apart; their classes, if they have some.

    ``skipped``: what was left out of them when they were loaded.
    """

    samples: Samples
    vocab_size: int
    fingerprint: str
    classes: dict[Class, int] = field(default_factory=dict)
    skipped: Skipped = field(default_factory=Skipped)


class Wanted(NamedTuple):
    """What a model wants of samples: how many tokens each has, what its config says, and how it numbers classes.

    ``skipped`` is told of records that are left out, if any may be.
    """

    seq_len: int
    config: PretrainedConfig
    number: Numbering
    skipped: Skipped


def check_task(data: DataSection, task: Task) -> None:
    """Raise DataError if a job makes no samples of ``data`` for ``task``."""
    if task not in RECORDS:
        raise DataError(
            f"a job makes samples for {', '.join(RECORDS)}, not for {task}; train it in a loop of "
            "your own (galvatron.train.tasks makes samples)"
        )
    if data.records not in RECORDS[task] or (data.separate_documents and task != "causal_lm"):
        raise DataError(
            f"{task} takes records={' or '.join(RECORDS[task])}, and separate_documents is for causal_lm alone; leave "
            f"out records={data.records} or separate_documents"
        )


def check_media(data: DataSection, task: Task) -> None:
    """Read every record, and every image or sound, of ``data``; raises DataError with the first that is bad.

    Where bad ones may be left out, all ranks look at all of them when they load them.
    """
    if not data.skip_bad_records:
        if task == "speech_to_text":
            _sounds(data, Skipped(), looks=True)
        else:
            _pictures(data, task, Skipped(), looks=True)


# Of tokens, which one file holds.


def of_tokens(data: DataSection, task: Task, tokens: np.ndarray, seq_len: int) -> Samples:
    """Rows of ``tokens`` as ``task`` takes them."""
    if task == "masked_lm":
        return MaskedRows(tokens, seq_len, _for_transformers(data))
    if task == "seq2seq_lm":
        return SpanRows(tokens, seq_len, _for_transformers(data), target_len=seq_len)
    return DocumentRows(tokens, seq_len) if data.is_apart else StreamRows(tokens, seq_len)


# Of records, which are in memory, images where they lie.


def _classed_images(data: DataSection, wanted: Wanted) -> Loaded:
    pictures = _pictures(data, "image_classification", wanted.skipped)
    samples = LabelledImages(pictures, load_processor(data), _augmentation(data), wanted.number)
    parts = [(Path(p.where).name, samples.classes[p.label]) for p in pictures if p.label is not None]
    return Loaded(samples, len(samples.classes), _digest(parts), samples.classes)


def _classed_texts(data: DataSection, wanted: Wanted) -> Loaded:
    found = LabelledTexts.read(
        data,
        wanted.seq_len,
        _for_transformers(data),
        label_field=data.label_field,
        number=wanted.number,
        skipped=wanted.skipped,
    )
    _check_words(data, found.highest, wanted.config)
    return Loaded(found, len(found.classes), found.fingerprint(), found.classes)


def _titled_images(data: DataSection, wanted: Wanted) -> Loaded:
    pictures, tokenizer = _pictures(data, "contrast", wanted.skipped), _for_transformers(data)
    samples = TitledImages(pictures, load_processor(data), tokenizer, wanted.seq_len, _augmentation(data))
    _check_words(data, samples.highest, wanted.config)
    return Loaded(samples, 0, _digest([(Path(p.where).name, p.text) for p in pictures]))


def _told_images(data: DataSection, wanted: Wanted) -> Loaded:
    token = image_token(wanted.config)
    if token is None:
        raise DataError(
            f"{wanted.config.model_type} names no token that stands for an image; train it in a loop of your own"
        )
    grids = Grids.of(wanted.config)
    if grids is not None and data.augment:
        raise DataError(
            f"images of {wanted.config.model_type} take as many tokens as they are large, which no crop may change; "
            "set data.augment = false"
        )
    pictures, tokenizer = _pictures(data, "vision_language", wanted.skipped), _tokenizer(data)
    told, processor = _encoded(data, tokenizer, pictures), load_processor(data)
    if grids is None:
        make, image = ToldImages, ImageTokens(token, image_length(wanted.config))
    else:
        _check_patches(data, processor, grids)
        make, image = ToldGrids, _framed(wanted.config, token)
    end, crops = tokenizer.end_of_text, _augmentation(data)
    samples = make(pictures, told, processor, wanted.seq_len, image, end, crops, wanted.skipped)
    parts = [(Path(p.where).name, p.text, p.learnt) for p in pictures]
    return Loaded(samples, samples.vocab_size, _digest(parts))


def _framed(config: PretrainedConfig, token: int) -> ImageTokens:
    """``token``, with what a config says stands around images (Qwen-VL's names, and GLM-4V's)."""

    def named(end: str) -> tuple[int, ...]:
        ids = (getattr(config, f"{kind}_{end}_token_id", None) for kind in ("vision", "image"))
        return tuple(each for each in ids if each is not None)[:1]

    return ImageTokens(token, before=named("start"), after=named("end"))


def _check_patches(data: DataSection, processor: Any, grids: Grids) -> None:
    """Raise DataError if the processor does not cut images as the model sees them."""
    made = processor(images=[np.zeros((64, 64, 3), np.uint8)], return_tensors="pt")
    if GRIDS not in made or (made[PIXELS].shape[1], processor.merge_size) != (grids.patch, grids.merge):
        raise DataError(
            f"data.processor={data.processor!r} makes no patches of {grids.patch} numbers, for {grids.merge} x "
            f"{grids.merge} of which the model has a token; give the model's own"
        )


def _told_sounds(data: DataSection, wanted: Wanted) -> Loaded:
    sounds, tokenizer = _sounds(data, wanted.skipped), _tokenizer(data)
    ear, own, end = Ear(load_extractor(data)), tokenizer.for_transformers(), tokenizer.end_of_text
    _, hears = input_shapes(wanted.config, "speech_to_text", 1, wanted.seq_len)["input_features"]
    if (made := tuple(ear.features(sounds[:1]).shape)) != hears:
        raise DataError(
            f"data.processor={data.processor!r} makes {list(made[1:])} bins and frames of a sound, but the model hears "
            f"{list(hears[1:])}; give the model's own"
        )
    told = [ended(ids, end) for ids in own([str(sound.text) for sound in sounds], verbose=False)["input_ids"]]
    start = _begun_with(wanted.config)
    samples = ToldSounds(sounds, told, ear, wanted.seq_len, start=start, padding=end, skipped=wanted.skipped)
    parts = [(Path(sound.where).name, sound.text) for sound in sounds]
    return Loaded(samples, samples.vocab_size, _digest(parts))


def _answered_texts(data: DataSection, wanted: Wanted) -> Loaded:
    found = AnsweredTexts.read(data, wanted.seq_len, _tokenizer(data), _begun_with(wanted.config), wanted.skipped)
    return Loaded(found, found.vocab_size, found.fingerprint())


def _begun_with(config: PretrainedConfig) -> int:
    start: int | None = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise DataError(
            f"{config.model_type} names no token that its decoder begins with; set decoder_start_token_id in its config"
        )
    return start


Kind = Callable[[DataSection, Wanted], Loaded]
"""How samples are made.  All raise DataError."""
_IN_MEMORY: dict[Task, Kind] = {
    "image_classification": _classed_images,
    "text_classification": _classed_texts,
    "contrast": _titled_images,
    "vision_language": _told_images,
    "speech_to_text": _told_sounds,
}


def kind_in_memory(data: DataSection, task: Task) -> Kind | None:
    """How the samples are made, unless they are rows of tokens."""
    return _answered_texts if (task, data.records) == ("seq2seq_lm", "pairs") else _IN_MEMORY.get(task)


def _pictures(data: DataSection, task: Task, skipped: Skipped, *, looks: bool = False) -> list[Picture]:
    found = _media(data, task, Picture, data.image_field, skipped)
    return _whole(found, Picture.check, skipped) if looks or skipped.allowed else found


def _sounds(data: DataSection, skipped: Skipped, *, looks: bool = False) -> list[Sound]:
    found = _media(data, "speech_to_text", Sound, data.audio_field, skipped)
    return _whole(found, Ear(load_extractor(data)).samples, skipped) if looks or skipped.allowed else found


def _media(data: DataSection, task: Task, kind: type[M], field: str, skipped: Skipped) -> list[M]:
    read = None
    if task != "image_classification":
        is_chat = data.records == "conversations"
        read = reader(data, ChatTemplate(_for_transformers(data)) if is_chat else None)
    fields = Fields(field, data.label_field, data.text_field, read, several=task == "vision_language")
    return kind.find(Path(data.source), fields, skipped)


def _whole(media: Sequence[M], look: Callable[[M], object], skipped: Skipped) -> list[M]:
    """Those of ``media`` that ``look`` finds nothing wrong with."""
    whole = []
    for medium in media:
        try:
            look(medium)
        except DataError as error:
            skipped.refuse(str(error))
        else:
            whole.append(medium)
    if not whole:
        raise DataError(f"{media[0].where} and all others are bad{skipped.told()}; mend them")
    return whole


def _encoded(data: DataSection, tokenizer: Tokenizer, pictures: Sequence[Picture]) -> list[np.ndarray]:
    """The tokens of what belongs to each picture, with what is said of them."""
    blocks = [Block(str(picture.text), picture.where, learnt=picture.learnt) for picture in pictures]
    return list(Encoder(data, tokenizer, None, Skipped()).encode(blocks))


def _augmentation(data: DataSection) -> Augmentation | None:
    return Augmentation() if data.augment else None


def _check_words(data: DataSection, highest: int, config: PretrainedConfig) -> None:
    if highest >= words_of(config):
        raise DataError(
            f"tokenizer {data.tokenizer} has {highest + 1} tokens but the model's vocabulary only {words_of(config)}; "
            "use the model's own tokenizer or a larger vocab_size"
        )


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _tokenizer(data: DataSection) -> Tokenizer:
    return load_tokenizer(data.tokenizer, data.chat_template)


def _for_transformers(data: DataSection) -> Any:
    return _tokenizer(data).for_transformers()
