"""Sequence to sequence: texts that an encoder reads and what its decoder is to say of each (translations, summaries).

Takes records with a prompt and a completion; gives token ids, padded on both sides; padding is neither seen nor learnt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from galvatron.core.errors import DataError
from galvatron.core.job import DataSection

from ..rows import IGNORED_LABEL
from ..sources import read_records
from ..text import Skipped, good, reader
from ..tokenizer import Tokenizer
from .classes import padded


class AnsweredTexts:
    """``texts`` and ``answers`` as ids [tokens], filled up to ``seq_len`` each.

    ``start``: what a decoder begins with; ``padding``: what both are filled up with.
    """

    labelled = True

    def __init__(
        self, texts: Sequence[list[int]], answers: Sequence[list[int]], seq_len: int, *, start: int, padding: int
    ) -> None:
        self._texts, self._answers, self.seq_len, self._start, self._padding = texts, answers, seq_len, start, padding

    @classmethod
    def read(
        cls, data: DataSection, seq_len: int, tokenizer: Tokenizer, start: int, skipped: Skipped | None = None
    ) -> Self:
        """Of the pairs of ``data.source``, with the tokenizer's own special tokens; both end with its end of text.

        Raises:
            DataError: a record is no pair, or longer than ``seq_len``, whose end would be lost.
        """
        skipped, read = skipped or Skipped(data.skip_bad_records), reader(data)

        def pair(where: str, record: dict[str, Any]) -> tuple[str, str, str]:
            text, learnt = read(record)
            assert learnt is not None
            return where, text[: learnt[0][0]], text[learnt[0][0] :]

        found = list(good(read_records(data), pair, skipped))
        if not found:
            raise DataError(f"data.source={data.source!r} has no pairs{skipped.told()}; give a source with some")
        places, prompts, completions = map(list, zip(*found, strict=True))
        own, end = tokenizer.for_transformers(), tokenizer.end_of_text
        texts = [ended(ids, end) for ids in own(prompts, verbose=False)["input_ids"]]
        answers = [ended(ids, end) for ids in own(text_target=completions, verbose=False)["input_ids"]]
        kept = []
        for where, both in zip(places, zip(texts, answers, strict=True), strict=True):
            if (longest := max(map(len, both))) > seq_len:
                skipped.refuse(
                    f"{where} has a prompt or a completion of {longest} tokens, for all of which a row of "
                    f"seq_len={seq_len} has no place; raise seq_len or shorten it"
                )
            else:
                kept.append(both)
        padding = end if own.pad_token_id is None else own.pad_token_id
        return cls([text for text, _ in kept], [answer for _, answer in kept], seq_len, start=start, padding=padding)

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def vocab_size(self) -> int:
        """All ids are below it."""
        return 1 + max((max(ids, default=0) for ids in (*self._texts, *self._answers)), default=0)

    def fingerprint(self) -> str:
        """What tells these ids from others."""
        return hashlib.sha256(repr((self._texts, self._answers)).encode()).hexdigest()

    def need(self, rows: int) -> str:
        """What ``rows`` rows take, and what there is, in words."""
        return f"{rows} pairs but the source has {len(self)}"

    def gather(self, rows: Sequence[int], draws: Sequence[object]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``decoder_input_ids`` and ``labels`` int64 [rows, seq_len].

        A decoder is given what it should have said before; after the end nothing counts.
        """
        ids, mask = padded([self._texts[row] for row in rows], self.seq_len, self._padding)
        answers = [self._answers[row] for row in rows]
        said = to_be_said(answers, self.seq_len, start=self._start, padding=self._padding)
        return {"input_ids": ids, "attention_mask": mask, **said}


def to_be_said(answers: Sequence[Sequence[int]], seq_len: int, *, start: int, padding: int) -> dict[str, Tensor]:
    """``decoder_input_ids`` and ``labels`` int64 [answers, seq_len]: what a decoder is given, and is to say of it."""
    said, counts = padded(answers, seq_len, padding)
    before = torch.from_numpy(np.full((len(answers), seq_len), start))
    before[:, 1:] = said[:, :-1]
    return {"decoder_input_ids": before, "labels": said.masked_fill(counts == 0, IGNORED_LABEL)}


def ended(ids: list[int], end: int) -> list[int]:
    """``ids`` with ``end`` behind them, once."""
    return ids if ids[-1:] == [end] else [*ids, end]
