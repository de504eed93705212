"""Masked language modelling: some tokens of a row are hidden, and are to be found again.

As BERT (Devlin et al. 2019, 3.1): of the tokens chosen, 80% become the mask, 10% a random token, 10% stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from galvatron.core.errors import DataError

from ..rows import IGNORED_LABEL

if TYPE_CHECKING:
    from ..data import Draw

SHARE = 0.15
MASKED, RANDOM = 0.8, 0.1
"""Of the chosen tokens; the rest stays (BERT, appendix A.1)."""


class MaskedRows:
    """Row i is ``seq_len`` tokens of ``tokens`` [num_tokens], with the tokenizer's first and last one if it has them.

    Raises:
        DataError: the ``tokenizer`` (of ``transformers``) has no mask token.
    """

    labelled = True

    def __init__(self, tokens: np.ndarray, seq_len: int, tokenizer: Any, *, share: float = SHARE) -> None:
        if tokenizer.mask_token_id is None:
            raise DataError("masked language modelling needs a tokenizer with a mask token; add one, or give BERT's")
        self.tokens, self.seq_len, self.share = tokens, seq_len, share
        self.mask, self.vocab_size = int(tokenizer.mask_token_id), len(tokenizer)
        self._special = np.array(sorted(tokenizer.all_special_ids))
        ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        self._before, self._after = ([] if end is None else [int(end)] for end in ends)
        self._content = seq_len - len(self._before) - len(self._after)

    def __len__(self) -> int:
        return len(self.tokens) // self._content

    def need(self, rows: int) -> str:
        """What ``rows`` rows take, and what there is, in words."""
        return f"about {rows * self._content} tokens but the source has {len(self.tokens)}"

    def gather(self, rows: Sequence[int], draws: Sequence[Draw]) -> dict[str, Tensor]:
        """``input_ids`` and ``labels`` of ``rows``: int64 [rows, seq_len], -100 where nothing was chosen."""
        made = [self._sample(row, draw) for row, draw in zip(rows, draws, strict=True)]
        ids, labels = (torch.from_numpy(np.stack(part)) for part in zip(*made, strict=True))
        return {"input_ids": ids, "labels": labels}

    def _sample(self, row: int, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
        content = self.tokens[row * self._content : (row + 1) * self._content].astype(np.int64)
        whole = np.concatenate((self._before, content, self._after)).astype(np.int64)
        random = draw.generator()
        chance, kind = random.random_sample((2, len(whole)))
        others = random.randint(0, self.vocab_size, len(whole))
        ordinary = ~np.isin(whole, self._special)
        chosen = ordinary & (chance < self.share)
        if not chosen.any() and ordinary.any():  # a row in which nothing counts teaches nothing
            chosen[np.argmin(np.where(ordinary, chance, 2.0))] = True
        ids = np.where(chosen & (kind < MASKED), self.mask, whole)
        ids = np.where(chosen & (kind >= MASKED) & (kind < MASKED + RANDOM), others, ids)
        return ids, np.where(chosen, whole, IGNORED_LABEL)
