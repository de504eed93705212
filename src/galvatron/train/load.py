"""The dataset of a run: what its model is trained for decides what a sample is.

Takes a job's sections and a run directory; gives a Dataset, equal on all ranks.  Rank 0 looks at everything first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from galvatron.core.errors import DataError
from galvatron.core.job import DataSection, TrainSection
from galvatron.core.tasks import Task
from galvatron.parallelize.processes.ranks import on_rank_zero, together

from .data import Dataset, Samples
from .rows import DocumentRows, StreamRows
from .tasks import Augmentation, LabelledImages, LabelledTexts, MaskedRows, SpanRows, check_pictures, find_pictures
from .tasks.classes import Class, Numbering, classes_of, named_classes
from .tasks.pictures import Fields
from .text import Skipped
from .tokenizer import load_tokenizer
from .tokens import Progress, TokenInfo, prepare_tokens


@dataclass(frozen=True)
class Loaded:
    """Samples; below which number their ids or classes are; what tells them apart; their classes, if they have some."""

    samples: Samples
    vocab_size: int
    fingerprint: str
    classes: dict[Class, int] = field(default_factory=dict)


def load_dataset(
    data: DataSection,
    train: TrainSection,
    run_dir: Path,
    *,
    task: Task = "causal_lm",
    class_names: Sequence[str] = (),
    progress: Progress | None = None,
) -> Dataset:
    """The dataset of a run.  A collective call: rank 0 tokenises once into ``run_dir/data``, all ranks map the file.

    Args:
        data, train: the job's sections.
        run_dir: on a disk that all nodes share.
        task: what the model is trained for.
        class_names: what the model calls its classes, by number.
        progress: called on rank 0 with the number of tokens so far.

    Raises:
        DataError: a source is missing, unreadable, empty, too short, or not what ``task`` takes.
    """
    loaded = _load(data, train, run_dir, task, progress, lambda labels: classes_of(labels, class_names))
    validation = None
    if (own := data.of_validation) is not None:
        validation = _dataset(_load(own, train, run_dir, task, progress, lambda _: loaded.classes), train, 1.0)
    return _dataset(loaded, train, data.held_out, named_classes(loaded.classes, class_names), validation)


def prepare_source(
    data: DataSection,
    train: TrainSection,
    run_dir: Path,
    *,
    task: Task = "causal_lm",
    progress: Progress | None = None,
    skipped: Skipped | None = None,
) -> Path:
    """Find what is wrong with ``data.source``, and tokenise it if it is text; one process only.  The file to read."""
    if task == "image_classification":
        check_pictures(find_pictures(Path(data.source), _fields(data)))
        return Path(data.source)
    if task == "text_classification":
        return Path(data.source)  # which is read as a whole, with the tokenizer
    _check_task(data, task)
    return prepare_tokens(data, run_dir, seq_len=train.seq_len, progress=progress, skipped=skipped)


def _dataset(
    loaded: Loaded,
    train: TrainSection,
    eval_fraction: float,
    class_names: tuple[str, ...] = (),
    validation: Dataset | None = None,
) -> Dataset:
    return Dataset(
        loaded.samples,
        global_batch_size=train.global_batch_size,
        seed=train.seed,
        eval_fraction=eval_fraction,
        vocab_size=loaded.vocab_size,
        fingerprint=loaded.fingerprint,
        class_names=class_names,
        validation=validation,
    )


def _load(
    data: DataSection,
    train: TrainSection,
    run_dir: Path,
    task: Task,
    progress: Progress | None,
    number: Numbering,
) -> Loaded:
    if task == "image_classification":
        return together(lambda: _images(data, number))
    if task == "text_classification":
        return together(lambda: _texts(data, train.seq_len, number))
    _check_task(data, task)
    path = on_rank_zero(lambda: prepare_tokens(data, run_dir, seq_len=train.seq_len, progress=progress))
    info = together(lambda: TokenInfo.load(path.with_suffix(".json")))
    tokens = together(lambda: _map_tokens(path, info.num_tokens))
    samples = together(lambda: _OF_TOKENS[task](data, tokens, train.seq_len))
    return Loaded(samples, info.vocab_size, info.sha256)


def _rows(data: DataSection, tokens: np.ndarray, seq_len: int) -> Samples:
    return DocumentRows(tokens, seq_len) if data.is_apart else StreamRows(tokens, seq_len)


def _masked(data: DataSection, tokens: np.ndarray, seq_len: int) -> Samples:
    return MaskedRows(tokens, seq_len, _tokenizer(data))


def _spans(data: DataSection, tokens: np.ndarray, seq_len: int) -> Samples:
    return SpanRows(tokens, seq_len, _tokenizer(data), target_len=seq_len)


_OF_TOKENS: dict[Task, Callable[[DataSection, np.ndarray, int], Samples]] = {
    "causal_lm": _rows,
    "masked_lm": _masked,
    "seq2seq_lm": _spans,
}


_OF_CLASSES: tuple[Task, ...] = ("text_classification", "image_classification")


def _check_task(data: DataSection, task: Task) -> None:
    if task not in _OF_TOKENS:
        raise DataError(
            f"a job makes samples for {', '.join((*_OF_TOKENS, *_OF_CLASSES))}, not for {task}; train it in a loop of "
            "your own (galvatron.train.tasks makes samples)"
        )
    if data.is_apart and task != "causal_lm":
        raise DataError(
            f"records={data.records} and separate_documents are for causal_lm, not for {task}; leave them out"
        )


def _tokenizer(data: DataSection) -> Any:
    return load_tokenizer(data.tokenizer).for_transformers()


def _fields(data: DataSection) -> Fields:
    return Fields(image=data.image_field, label=data.label_field)


def _images(data: DataSection, number: Numbering) -> Loaded:
    pictures = find_pictures(Path(data.source), _fields(data))
    samples = LabelledImages(pictures, load_processor(data), Augmentation() if data.augment else None, number)
    parts = [
        (Path(picture.where).name, samples.classes[picture.label or 0])
        for picture in pictures
        if picture.label is not None
    ]
    return Loaded(samples, len(samples.classes), hashlib.sha256(repr(parts).encode()).hexdigest(), samples.classes)


def _texts(data: DataSection, seq_len: int, number: Numbering) -> Loaded:
    found = LabelledTexts.read(data, seq_len, _tokenizer(data), label_field=data.label_field, number=number)
    return Loaded(found, len(found.classes), found.fingerprint(), found.classes)


def load_processor(data: DataSection) -> Any:
    """The image processor of a job.  Raises DataError if there is none that loads."""
    from transformers import AutoImageProcessor

    if data.processor is None:
        raise DataError("images need an image processor; set data.processor to the model's directory or hub name")
    try:
        return AutoImageProcessor.from_pretrained(data.processor)
    except Exception as error:  # the library raises many kinds; each means that there is no such processor
        reason = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        raise DataError(
            f"data.processor={data.processor!r} is no image processor that loads ({reason}); give one"
        ) from None


def _map_tokens(path: Path, num_tokens: int) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}; put the run directory on a disk that all nodes share, or delete the file"
        ) from None
    if tokens.shape != (num_tokens,):
        raise DataError(f"{path} must hold {num_tokens} tokens but has shape {tokens.shape}; delete it")
    return np.asarray(tokens)
