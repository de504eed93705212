"""Batches that a model must refuse, each by one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from galvatron.core.errors import DataError
from galvatron.parallelize.checks.batch import BatchCheck

SHAPE, VOCABULARY = (2, 3), 103


def weight(input_ids: Any, labels: Any, position_ids: Any = None, **settings: Any) -> float:
    inputs = (
        {"input_ids": input_ids} if position_ids is None else {"input_ids": input_ids, "position_ids": position_ids}
    )
    return BatchCheck(SHAPE, VOCABULARY).weight(inputs, labels, **settings)


def ids(*changes: tuple[int, int, int]) -> Tensor:
    values = torch.arange(6).reshape(SHAPE)
    for row, position, value in changes:
        values[row, position] = value
    return values


def test_a_token_weighs_one_over_those_that_count() -> None:
    assert weight(ids(), ids()) == 1 / 6
    assert weight(ids(), ids((0, 0, -100), (1, 2, 102))) == 1 / 5
    assert weight(ids(), ids((0, 0, -100)), num_tokens=17) == 1 / 17
    assert weight(ids(), torch.full(SHAPE, -100), num_tokens=17) == 1 / 17


@pytest.mark.parametrize("value", [-1, -100, 103, 500])
def test_ids_outside_the_vocabulary_are_named(value: int) -> None:
    words = rf"input_ids\[1, 0\]={value} is not among the model's 103 ids \(0 to 102\)"
    with pytest.raises(DataError, match=words):
        weight(ids((1, 0, value)), ids())


@pytest.mark.parametrize("value", [-1, -99, -101, 103, 500])
def test_labels_outside_the_vocabulary_are_named(value: int) -> None:
    with pytest.raises(DataError, match=rf"labels\[0, 2\]={value} is not among .*what does not count by -100"):
        weight(ids(), ids((0, 2, value)))


@pytest.mark.parametrize(
    ("input_ids", "labels", "words"),
    [
        (ids().int(), ids(), r"input_ids must be int64, got int32; convert with \.long\(\)"),
        (ids(), ids().float(), "labels must be int64, got float32"),
        (ids().bool(), ids(), "input_ids must be int64, got bool"),
        (ids().tolist(), ids(), "input_ids must be a tensor, got list"),
        (ids(), ids().numpy(), "labels must be a tensor, got ndarray"),
        (ids()[:1], ids()[:1], r"the plan's shape \[2, 3\] on every rank, got input_ids of \[1, 3\]"),
        (ids(), ids().T, r"got labels of \[3, 2\]"),
        (ids(), torch.full(SHAPE, -100), "no label of the batch counts, all are -100"),
    ],
)
def test_other_batches_are_refused(input_ids: Any, labels: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        weight(input_ids, labels)


@pytest.mark.parametrize("num_tokens", [5, 0, -1])
def test_fewer_tokens_than_count_are_refused(num_tokens: int) -> None:
    with pytest.raises(DataError, match=f"num_tokens={num_tokens} must count the labels of all calls.*but 6 count"):
        weight(ids(), ids(), num_tokens=num_tokens)


def test_any_stride_will_do() -> None:
    turned = ids().T.contiguous().T
    assert not turned.is_contiguous()
    assert weight(turned, ids()[:1].expand(SHAPE)) == 1 / 6
