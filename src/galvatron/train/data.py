"""Samples to training batches, in an order that only the seed decides.

Takes samples by number; knows nothing of models, plans or how many ranks there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from galvatron.core.errors import DataError

from .rows import IGNORED_LABEL
from .text import Skipped

__all__ = ["IGNORED_LABEL", "Batch", "Dataset", "Draw", "Samples"]

Batch = dict[str, torch.Tensor]
"""Tensors by name, equal on all ranks, a sample along dim 0 of each."""
_TRAINED, _EVALUATED = 1, 2


@dataclass(frozen=True, slots=True)
class Draw:
    """The random numbers of one sample: the same for every plan and after every resume."""

    seed: int
    use: int
    index: int

    @property
    def trains(self) -> bool:
        """Whether the sample is trained on, not evaluated on."""
        return self.use == _TRAINED

    def generator(self) -> np.random.RandomState:
        """RandomState over MT19937: numpy freezes its stream, so what is drawn outlives numpy's versions."""
        return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, self.use, self.index])))


class Samples(Protocol):
    """Samples by number, of one shape.

    ``labelled``: whether their batches have ``labels``, by which samples can be told not to count.
    """

    labelled: bool

    def __len__(self) -> int: ...

    def need(self, rows: int) -> str:
        """What ``rows`` samples take, and what there is, in words: ``9 samples but the source has 7``."""

    def gather(self, rows: Sequence[int], draws: Sequence[Draw]) -> Batch:
        """The samples ``rows``; what is random in each comes from its draw alone."""


class Dataset:
    """``samples`` in batches, split into training and evaluation rows.

    Evaluation rows are spread evenly over the samples.  Training rows come in an order that depends on (seed, epoch)
    and nothing else: the same on every rank, for every plan and after every resume.

    Attributes:
        vocab_size: all ids are below it.
        skipped: the records that were left out when it was loaded.
        fingerprint: tells samples apart; equal ones have one.
        class_names: what the model calls its classes from now on, by number; none of tokens.
        validation: a dataset of another source, all of whose rows are evaluated on.

    Raises:
        DataError: too few samples for one batch, or a seed or ``eval_fraction`` outside of its range.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        global_batch_size: int,
        seed: int = 0,
        eval_fraction: float = 0.0,
        vocab_size: int = 0,
        fingerprint: str = "",
        skipped: Skipped | None = None,
        class_names: tuple[str, ...] = (),
        validation: Dataset | None = None,
    ) -> None:
        if not 0 <= seed < 2**64 or not 0 <= eval_fraction <= 1:
            raise DataError(f"seed={seed} must be from 0 to 2^64 - 1 and eval_fraction={eval_fraction} from 0 to 1")
        num_rows, trains = len(samples), eval_fraction < 1
        num_eval = max(1, round(num_rows * eval_fraction)) if eval_fraction > 0 else 0
        if num_rows - num_eval < global_batch_size * trains or not num_rows:
            rows, told = 1, skipped.told() if skipped else ""
            if trains:
                rows = max(math.ceil(global_batch_size / (1 - eval_fraction)), global_batch_size + (eval_fraction > 0))
            raise DataError(
                f"one batch of {global_batch_size} sequences, with eval_fraction={eval_fraction}, needs "
                f"{samples.need(rows)}{told}; give more data or lower global_batch_size or seq_len"
            )
        self.samples, self.global_batch_size, self.seed = samples, global_batch_size, seed
        self.vocab_size, self.fingerprint, self.eval_fraction = vocab_size, fingerprint, eval_fraction
        self.class_names, self.validation, self.skipped = class_names, validation, skipped or Skipped()
        # row i is for evaluation where i·num_eval/num_rows passes an integer: num_eval rows at equal distances
        index = np.arange(num_rows, dtype=np.int64)
        chosen = (index + 1) * num_eval // num_rows > index * num_eval // num_rows
        self.eval_rows, self.train_rows = index[chosen], index[~chosen]
        self._order: tuple[int, np.ndarray] = (-1, index[:0])

    def batch(self, step: int) -> Batch:
        """The samples of update ``step`` (0-based): CPU tensors [global_batch_size, ...]."""
        places = range(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        draws = [Draw(self.seed, _TRAINED, place) for place in places]
        return self.samples.gather([self._train_row(place) for place in places], draws)

    @property
    def num_eval_batches(self) -> int:
        """How many batches hold all evaluation rows, or all but what fills no batch where there are no labels."""
        rows = len(self.eval_rows) + (self.global_batch_size - 1 if self.samples.labelled else 0)
        return rows // self.global_batch_size

    def eval_batch(self, index: int) -> Batch:
        """Evaluation batch ``index``, shaped as ``batch``; where rows run out, labels are ignored (-100)."""
        rows = self.eval_rows[index * self.global_batch_size : (index + 1) * self.global_batch_size].tolist()
        whole = [*rows, *[rows[-1]] * (self.global_batch_size - len(rows))]
        batch = self.samples.gather(whole, [Draw(self.seed, _EVALUATED, row) for row in whole])
        if self.samples.labelled:
            batch["labels"][len(rows) :] = IGNORED_LABEL
        return batch

    def _train_row(self, position: int) -> int:
        epoch, place = divmod(position, len(self.train_rows))
        if self._order[0] != epoch:
            # RandomState over MT19937: numpy freezes its stream, so an order outlives numpy's versions
            generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, epoch])))
            self._order = (epoch, generator.permutation(len(self.train_rows)))
        return int(self.train_rows[self._order[1][place]])
