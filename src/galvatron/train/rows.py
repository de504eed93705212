"""Tokens to rows of one length: as they follow each other, or whole documents packed side by side.

Takes tokens as ``tokens`` writes them; gives rows by number.  Knows nothing of their order in training, nor of ranks.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .tokens import BEGINS, UNLEARNT, ids_of

IGNORED_LABEL = -100
_SCANNED = 1 << 24  # tokens at a time


class StreamRows:
    """Row i is tokens [i·seq_len, (i+1)·seq_len] of ``tokens`` [num_tokens], whatever documents they are of.

    Labels are a row's inputs shifted by one, so rows share one token.
    """

    labelled = True

    def __init__(self, tokens: np.ndarray, seq_len: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.seq_len)

    def need(self, rows: int) -> str:
        """What ``rows`` rows take, and what there is, in words."""
        return f"about {rows * self.seq_len + 1} tokens but the source has {len(self.tokens)}"

    def gather(self, rows: Sequence[int], draws: Sequence[object]) -> dict[str, Tensor]:
        """``input_ids`` and ``labels`` of ``rows``: int64 [rows, seq_len]."""
        length = self.seq_len
        packed = np.stack([self.tokens[row * length : (row + 1) * length + 1] for row in rows]).astype(np.int64)
        return {"input_ids": torch.from_numpy(packed[:, :-1].copy()), "labels": torch.from_numpy(packed[:, 1:].copy())}


class DocumentRows:
    """Whole documents of ``tokens`` (uint32 [num_tokens], with what is said of them), several to a row.

    A document of n tokens takes n - 1 places: none is predicted across documents.  One that is longer than a row is
    cut into pieces, which are documents of their own.  Positions begin at 0 in each, and so in what no document fills.
    """

    labelled = True

    def __init__(self, tokens: np.ndarray, seq_len: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len
        starts = np.concatenate([_begins(tokens[at : at + _SCANNED]) + at for at in range(0, len(tokens), _SCANNED)])
        lengths = np.diff(starts, append=len(tokens)) - 1
        counts = -(-lengths // seq_len)
        nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of its document
        self._starts = np.repeat(starts, counts) + nth * seq_len
        self._lengths = np.minimum(np.repeat(lengths, counts) - nth * seq_len, seq_len)
        row = pack(self._lengths, seq_len)
        self._pieces = np.argsort(row, kind="stable")
        self._first = np.searchsorted(row[self._pieces], np.arange(row.max(initial=-1) + 2))

    def __len__(self) -> int:
        return len(self._first) - 1

    def need(self, rows: int) -> str:
        """What ``rows`` rows take, and what there is, in words."""
        return f"{rows} rows of documents but those of the source fill {len(self)}"

    def gather(self, rows: Sequence[int], draws: Sequence[object]) -> dict[str, Tensor]:
        """``input_ids``, ``labels`` and ``position_ids`` of ``rows``: int64 [rows, seq_len]."""
        ids, positions = np.zeros((2, len(rows), self.seq_len), np.int64)
        labels = np.full((len(rows), self.seq_len), IGNORED_LABEL)
        for nth, row in enumerate(rows):
            at = 0
            for piece in self._pieces[self._first[row] : self._first[row + 1]]:
                length = int(self._lengths[piece])
                told = self.tokens[self._starts[piece] : self._starts[piece] + length + 1]
                values, place = ids_of(told), slice(at, at + length)
                ids[nth, place] = values[:-1]
                labels[nth, place] = np.where(told[1:] & UNLEARNT, IGNORED_LABEL, values[1:].astype(np.int64))
                positions[nth, place] = np.arange(length)
                at += length
            positions[nth, at:] = np.arange(self.seq_len - at)
        named = {"input_ids": ids, "labels": labels, "position_ids": positions}
        return {name: torch.from_numpy(values) for name, values in named.items()}


def pack(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Into which row each piece goes, by its length: the longest first, each where it leaves the least space.

    Best fit decreasing takes at most 11/9 of the fewest rows there can be (Johnson 1974), and one row more.
    """
    row_of, num_rows = np.empty(len(lengths), np.int64), 0
    spaces: list[int] = []  # that some row has left, ascending
    rows: defaultdict[int, list[int]] = defaultdict(list)
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        at = bisect_left(spaces, length)
        if at == len(spaces):
            space, row, num_rows = seq_len, num_rows, num_rows + 1
        else:
            space = spaces[at]
            row = rows[space].pop()
            if not rows[space]:
                spaces.pop(at)
        row_of[piece], left = row, space - length
        if left:
            if not rows[left]:
                insort(spaces, left)
            rows[left].append(row)
    return row_of


def _begins(tokens: np.ndarray) -> np.ndarray:
    return np.flatnonzero(tokens & BEGINS)
