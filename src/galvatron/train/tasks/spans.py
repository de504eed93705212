"""Span corruption: runs of tokens are cut out, each leaves a sentinel, and they are to be told one after the other.

As T5 (Raffel et al. 2020, 3.1.4): 15% of the tokens in spans of 3 on average, drawn as its ``random_spans_noise_mask``
does, so that the lengths of inputs and targets are the same for all rows, and inputs are not padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from galvatron.core.errors import DataError
from galvatron.core.units import counted

from ..rows import IGNORED_LABEL

if TYPE_CHECKING:
    from ..data import Draw

NOISE, MEAN_SPAN = 0.15, 3.0


def lengths_of(raw: int, noise: float = NOISE, mean_span: float = MEAN_SPAN) -> tuple[int, int, int]:
    """(tokens cut out, spans, length of inputs) of ``raw`` tokens; targets are as long as cut out + spans + 1."""
    cut = min(max(round(raw * noise), 1), raw - 1)
    spans = max(1, min(round(cut / mean_span), raw - cut))
    return cut, spans, raw - cut + spans + 1


class SpanRows:
    """Row i is the most tokens of ``tokens`` [num_tokens] whose corrupted inputs, with an end, are ``seq_len``.

    Targets are filled up to ``target_len``.

    Raises:
        DataError: the ``tokenizer`` (of ``transformers``) has no end of sequence or too few sentinels (``<extra_id_0>``
            and so on), or ``seq_len`` is too short.
    """

    labelled = True

    def __init__(self, tokens: np.ndarray, seq_len: int, tokenizer: Any, target_len: int | None = None) -> None:
        if seq_len < 4 or tokenizer.eos_token_id is None:
            raise DataError(f"span corruption needs an end-of-sequence token and seq_len={seq_len} of 4 or more")
        self.raw = max(raw for raw in range(2, 2 * seq_len) if lengths_of(raw)[2] <= seq_len)
        self.tokens, self.seq_len, self._end = tokens, seq_len, int(tokenizer.eos_token_id)
        self._cut, self._spans, _ = lengths_of(self.raw)
        self._start = tokenizer.pad_token_id or 0  # what T5's decoder begins with
        self.target_len = target_len or self._cut + self._spans + 1
        if self.target_len < self._cut + self._spans + 1:
            raise DataError(f"targets have {self._cut + self._spans + 1} tokens, more than {target_len}; raise it")
        names = [f"<extra_id_{number}>" for number in range(self._spans)]
        known = tokenizer.get_vocab()
        if missing := [name for name in names if name not in known]:
            spans = counted(self._spans, "span")
            raise DataError(
                f"rows of {seq_len} tokens have {spans}, but the tokenizer lacks {missing[0]}; give T5's, "
                "add sentinels or lower seq_len"
            )
        self._sentinels = np.array([known[name] for name in names])

    def __len__(self) -> int:
        return len(self.tokens) // self.raw

    def need(self, rows: int) -> str:
        """What ``rows`` rows take, and what there is, in words."""
        return f"about {rows * self.raw} tokens but the source has {len(self.tokens)}"

    def gather(self, rows: Sequence[int], draws: Sequence[Draw]) -> dict[str, Tensor]:
        """``input_ids`` int64 [rows, seq_len]; ``decoder_input_ids`` and ``labels`` int64 [rows, target_len].

        A decoder is given what it should have said before; after the end nothing counts.
        """
        made = [self._sample(row, draw) for row, draw in zip(rows, draws, strict=True)]
        ids, targets = (torch.from_numpy(np.stack(part)) for part in zip(*made, strict=True))
        labels = torch.full((len(rows), self.target_len), IGNORED_LABEL)
        labels[:, : targets.shape[1]] = targets
        before = labels.roll(1, dims=1).masked_fill(labels.roll(1, dims=1) == IGNORED_LABEL, self._start)
        before[:, 0] = self._start
        return {"input_ids": ids, "decoder_input_ids": before, "labels": labels}

    def _sample(self, row: int, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
        content = self.tokens[row * self.raw : (row + 1) * self.raw].astype(np.int64)
        random = draw.generator()
        kept = _parts(self.raw - self._cut, self._spans, random)
        cut = _parts(self._cut, self._spans, random)
        inputs, targets, at = [], [], 0
        for sentinel, stays, goes in zip(self._sentinels, kept, cut, strict=True):
            inputs += [content[at : at + stays], [sentinel]]
            targets += [[sentinel], content[at + stays : at + stays + goes]]
            at += stays + goes
        return tuple(np.concatenate([*parts, [self._end]]).astype(np.int64) for parts in (inputs, targets))  # type: ignore[return-value]


def _parts(total: int, parts: int, random: np.random.RandomState) -> np.ndarray:
    """``total`` as a sum of ``parts`` numbers from 1 on, every such sum as likely as another."""
    ends = np.sort(random.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(ends, prepend=0, append=total)
