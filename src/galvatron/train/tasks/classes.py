"""Text classification: a text and the class it is of, in memory.

Takes records with a field of text and one of a class; gives token ids, masks and numbers of classes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from galvatron.core.errors import DataError
from galvatron.core.job import DataSection
from galvatron.core.words import shown

from ..sources import read_records
from ..text import BadRecord, Skipped, good, listed, reader

Class = str | int
Numbering = Callable[[Iterable[Class]], dict[Class, int]]
"""From the labels of all samples to the number of each class."""
_UNNAMED = re.compile(r"LABEL_\d+")  # what transformers calls a class without a name


def classes_of(labels: Iterable[Class], names: Sequence[str] = ()) -> dict[Class, int]:
    """The number of each class for a model that calls its classes ``names``, by number.

    Names that the model has, and numbers that it has, are its own; others are numbered in their order.

    Raises:
        DataError: names and numbers are among ``labels``, or names that only in part are those of the model.
    """
    found = set(labels)
    kinds = {type(label) for label in found}
    if kinds != {str} and kinds != {int}:
        raise DataError(f"classes must be names or whole numbers, all alike, got {shown(sorted(map(str, found))[:5])}")
    own: Iterable[Class] = names if kinds == {str} else range(len(names))
    if found <= set(own):
        return {label: number for number, label in enumerate(own)}
    named = {name for name in names if not _UNNAMED.fullmatch(name)}
    if named and kinds == {str} and (found & named or len(found) < len(names)):
        raise DataError(
            f"class {shown(min(map(str, found - set(own))))} is none of the {len(names)} that the model's config "
            f"names ({shown(sorted(named)[:3])}, ...); mend it, or set model.num_labels for classes of your own"
        )
    return {label: number for number, label in enumerate(sorted(found))}


def named_classes(classes: dict[Class, int], names: Sequence[str]) -> tuple[str, ...]:
    """What a model of ``classes`` calls them, by number; it called them ``names``."""
    if classes and all(type(label) is int and label == number for label, number in classes.items()):
        return tuple(names)
    found = {number: str(label) for label, number in classes.items()}
    return tuple(found.get(number, name) for number, name in enumerate(names))


def class_in(record: dict[str, Any], field: str) -> Class:
    """The class that ``record`` is of.  Raises BadRecord if there is none."""
    if field not in record:
        raise BadRecord(f"has no field {field!r} for its class, its fields: {listed(record)}; set data.label_field")
    label = record[field]
    if type(label) not in (str, int):
        raise BadRecord(f"must have a class, name or number, in field {field!r}, got {shown(label)}; mend it")
    return label


class LabelledTexts:
    """``texts`` with the tokenizer's own special tokens, cut off and padded at ``seq_len``, and their classes.

    All ids are at most ``highest``.

    Raises:
        DataError: the ``tokenizer`` (of ``transformers``) has no padding token, or ``number`` leaves a label out.
    """

    labelled = True

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[Class],
        seq_len: int,
        tokenizer: Any,
        number: Numbering = classes_of,
    ) -> None:
        if tokenizer.pad_token_id is None:
            raise DataError("text classification needs a tokenizer with a padding token; set one (often its eos token)")
        self.classes, self.seq_len = number(labels), seq_len
        if unknown := set(labels) - self.classes.keys():
            raise DataError(f"{shown(min(map(str, unknown)))} is none of the {len(self.classes)} classes trained on")
        self._labels = np.array([self.classes[label] for label in labels])
        self._ids, self._pad = cut_off(list(texts), tokenizer, seq_len), tokenizer.pad_token_id
        self.highest = max((max(ids, default=0) for ids in self._ids), default=0)

    @classmethod
    def read(
        cls,
        data: DataSection,
        seq_len: int,
        tokenizer: Any,
        *,
        label_field: str = "label",
        number: Numbering = classes_of,
        skipped: Skipped | None = None,
    ) -> Self:
        """Of the records of ``data.source``: texts in ``data.text_field``, classes in ``label_field``."""
        skipped, read = skipped or Skipped(data.skip_bad_records), reader(data)

        def labelled(_: str, record: dict[str, Any]) -> tuple[str, Class]:
            return read(record)[0], class_in(record, label_field)

        found = list(good(read_records(data), labelled, skipped))
        if not found:
            raise DataError(f"data.source={data.source!r} has no texts{skipped.told()}; give a source with some")
        texts, labels = zip(*found, strict=True)
        return cls(texts, labels, seq_len, tokenizer, number)

    def __len__(self) -> int:
        return len(self._ids)

    def fingerprint(self) -> str:
        """What tells these ids and classes from others."""
        return hashlib.sha256(repr((self._ids, self._labels.tolist())).encode()).hexdigest()

    def need(self, rows: int) -> str:
        """What ``rows`` rows take, and what there is, in words."""
        return f"{rows} texts but the source has {len(self)}"

    def gather(self, rows: Sequence[int], draws: Sequence[object]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` int64 [rows, seq_len], and ``labels`` int64 [rows]."""
        ids, mask = padded([self._ids[row] for row in rows], self.seq_len, self._pad)
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.from_numpy(self._labels[list(rows)])}


def cut_off(texts: list[str], tokenizer: Any, seq_len: int) -> list[list[int]]:
    """The ids of ``texts``, of ``seq_len`` at most.  Raises DataError if special tokens alone are more."""
    found: list[list[int]] = tokenizer(texts, truncation=True, max_length=seq_len)["input_ids"]
    if max(map(len, found), default=0) > seq_len:  # truncation gives up where nothing of a text is left
        special = tokenizer.num_special_tokens_to_add()
        raise DataError(f"seq_len={seq_len} must be more than the {special} tokens that a text has around it; raise it")
    return found


def padded(texts: Sequence[Sequence[int]], seq_len: int, pad: int) -> tuple[Tensor, Tensor]:
    """Ids filled up with ``pad``, and 1 where they are not: int64 [texts, seq_len] twice."""
    ids, mask = np.full((len(texts), seq_len), pad), np.zeros((len(texts), seq_len), np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)
