"""Tokens to training batches: packed into rows, in an order only the seed decides.

Takes a file of tokens and a TrainSection; knows nothing of models, plans or how many ranks there are.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from galvatron.core.errors import DataError
from galvatron.core.job import DataSection, TrainSection
from galvatron.parallelize.processes.ranks import on_rank_zero, together

from .tokens import Progress, TokenInfo, prepare_tokens

IGNORED_LABEL = -100


class Dataset:
    """Packed rows of ``tokens`` [num_tokens], split into training and evaluation rows.

    Row i is tokens [i·seq_len, (i+1)·seq_len], so labels are its inputs shifted by one and rows share one
    token.  Evaluation rows are spread evenly over the tokens.  Training rows come in an order that depends on
    (seed, epoch) and nothing else: the same on every rank, for every plan and after every resume.

    Raises:
        DataError: too few tokens for one row, too few training rows for one batch, or a seed or ``eval_fraction``
            outside of its range.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        seq_len: int,
        global_batch_size: int,
        seed: int = 0,
        eval_fraction: float = 0.0,
        vocab_size: int | None = None,
        fingerprint: str = "",
    ) -> None:
        if not 0 <= seed < 2**64 or not 0 <= eval_fraction < 1:
            raise DataError(
                f"seed={seed} must be from 0 to 2^64 - 1 and eval_fraction={eval_fraction} from 0 to below 1"
            )
        num_rows = (len(tokens) - 1) // seq_len
        num_eval = max(1, round(num_rows * eval_fraction)) if eval_fraction > 0 else 0
        if num_rows - num_eval < global_batch_size:
            rows = max(math.ceil(global_batch_size / (1 - eval_fraction)), global_batch_size + (eval_fraction > 0))
            raise DataError(
                f"one batch of {global_batch_size} sequences x {seq_len} tokens, with eval_fraction={eval_fraction}, "
                f"needs about {rows * seq_len + 1} tokens but the source has {len(tokens)}; give more text or lower "
                "global_batch_size or seq_len"
            )
        self.tokens, self.seq_len, self.global_batch_size, self.seed = tokens, seq_len, global_batch_size, seed
        self.vocab_size = int(tokens.max()) + 1 if vocab_size is None else vocab_size
        self.fingerprint, self.eval_fraction = fingerprint, eval_fraction
        # row i is for evaluation where i·num_eval/num_rows passes an integer: num_eval rows at equal distances
        index = np.arange(num_rows, dtype=np.int64)
        chosen = (index + 1) * num_eval // num_rows > index * num_eval // num_rows
        self.eval_rows, self.train_rows = index[chosen], index[~chosen]
        self._order: tuple[int, np.ndarray] = (-1, index[:0])

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, labels) of update ``step`` (0-based): int64 CPU tensors [global_batch_size, seq_len]."""
        first = step * self.global_batch_size
        return self._gather([self._train_row(first + i) for i in range(self.global_batch_size)])

    @property
    def num_eval_batches(self) -> int:
        """How many batches hold all evaluation rows."""
        return -(-len(self.eval_rows) // self.global_batch_size)

    def eval_batch(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Evaluation batch ``index``, shaped as ``batch``; where rows run out, labels are ignored (-100)."""
        rows = self.eval_rows[index * self.global_batch_size : (index + 1) * self.global_batch_size]
        padding = self.global_batch_size - len(rows)
        inputs, labels = self._gather([*rows, *[rows[-1]] * padding])
        labels[len(rows) :] = IGNORED_LABEL
        return inputs, labels

    def _train_row(self, position: int) -> int:
        epoch, place = divmod(position, len(self.train_rows))
        if self._order[0] != epoch:
            # RandomState over MT19937: numpy freezes its stream, so an order outlives numpy's versions
            generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, epoch])))
            self._order = (epoch, generator.permutation(len(self.train_rows)))
        return int(self.train_rows[self._order[1][place]])

    def _gather(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        length = self.seq_len
        packed = np.stack([self.tokens[row * length : (row + 1) * length + 1] for row in rows]).astype(np.int64)
        return torch.from_numpy(packed[:, :-1].copy()), torch.from_numpy(packed[:, 1:].copy())


def load_dataset(data: DataSection, train: TrainSection, run_dir: Path, *, progress: Progress | None = None) -> Dataset:
    """The dataset of a run.  A collective call: rank 0 tokenises once into ``run_dir/data``, all ranks map the file.

    Args:
        data, train: the job's sections.
        run_dir: on a disk that all nodes share.
        progress: called on rank 0 with the number of tokens so far.

    Raises:
        DataError: the source is missing, unreadable, empty or too short.
    """
    path = on_rank_zero(lambda: prepare_tokens(data, run_dir, progress=progress))
    info = together(lambda: TokenInfo.load(path.with_suffix(".json")))
    tokens = together(lambda: _map_tokens(path, info.num_tokens))
    return Dataset(
        tokens,
        seq_len=train.seq_len,
        global_batch_size=train.global_batch_size,
        seed=train.seed,
        eval_fraction=data.eval_fraction,
        vocab_size=info.vocab_size,
        fingerprint=info.sha256,
    )


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
