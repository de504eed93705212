"""Documents in rows: whole, once each, with labels and positions of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from galvatron.core.errors import DataError
from galvatron.train.data import IGNORED_LABEL, Dataset
from galvatron.train.rows import DocumentRows, pack
from galvatron.train.tokens import BEGINS, UNLEARNT


def tokens_of(lengths: list[int], unlearnt: int = 0) -> np.ndarray:
    """Documents of so many tokens, numbered through from 1; the first ``unlearnt`` of each are so."""
    tokens = np.arange(1, sum(lengths) + 1, dtype=np.uint32)
    for start, length in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True):
        tokens[start] |= BEGINS
        tokens[start : start + min(unlearnt, length)] |= UNLEARNT
    return tokens


@pytest.mark.parametrize("lengths", [[5, 2, 9, 3, 3, 4], [1, 9, 1], [30, 2]])
def test_every_step_to_a_next_token_is_in_one_row_once(lengths: list[int]) -> None:
    rows = DocumentRows(tokens_of(lengths), 8)
    batch = rows.gather(range(len(rows)), [])
    ids, labels, positions = batch["input_ids"], batch["labels"], batch["position_ids"]
    counted = labels != IGNORED_LABEL
    assert torch.equal(labels[counted], ids[counted] + 1)
    ends = set(np.cumsum(lengths).tolist())
    assert sorted(ids[counted].tolist()) == [i for i in range(1, sum(lengths) + 1) if i not in ends]
    after = positions[:, 1:] != 0
    assert torch.equal(positions[:, 1:][after], positions[:, :-1][after] + 1)
    assert torch.equal(ids[:, 1:][after & counted[:, 1:]], ids[:, :-1][after & counted[:, 1:]] + 1)
    assert (positions[:, 0] == 0).all()


def test_what_is_unlearnt_is_no_label_but_an_input() -> None:
    batch = DocumentRows(tokens_of([5, 3], unlearnt=2), 6).gather([0], [])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 6, 7]]
    assert batch["labels"].tolist() == [[-100, 3, 4, 5, -100, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]


def test_a_row_that_is_not_full_ends_in_a_document_of_nothing() -> None:
    batch = DocumentRows(tokens_of([4]), 6).gather([0], [])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0, 0]]
    assert batch["labels"].tolist() == [[2, 3, 4, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]


def test_packing_is_tight_and_depends_on_lengths_alone() -> None:
    lengths = np.random.RandomState(0).randint(1, 65, size=2000)
    rows = pack(lengths, 64)
    filled = np.bincount(rows, lengths)
    assert filled.max() <= 64
    assert len(filled) <= -(-lengths.sum() // 64) * 1.02
    assert np.array_equal(rows, pack(lengths, 64))
    assert pack(np.array([3, 5, 2, 6]), 8).tolist() == [1, 1, 0, 0]


def test_rows_of_documents_are_held_out_and_counted_as_any() -> None:
    rows = DocumentRows(tokens_of([7] * 20), 6)
    data = Dataset(rows, global_batch_size=4, eval_fraction=0.2)
    assert (len(data.train_rows), len(data.eval_rows)) == (16, 4)
    with pytest.raises(DataError, match="needs 41 rows of documents but those of the source fill 20"):
        Dataset(rows, global_batch_size=40, eval_fraction=0.02)


def test_a_validation_source_is_evaluated_on_whole_and_may_be_short() -> None:
    data = Dataset(DocumentRows(tokens_of([7] * 3), 6), global_batch_size=4, eval_fraction=1.0)
    assert data.num_eval_batches == 1
    assert (data.eval_batch(0)["labels"][3] == IGNORED_LABEL).all()
    with pytest.raises(DataError, match="needs 1 rows of documents but those of the source fill 0"):
        Dataset(DocumentRows(tokens_of([1]), 6), global_batch_size=4, eval_fraction=1.0)
