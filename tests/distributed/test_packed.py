"""Packed documents under every technique against each document by itself in plain transformers."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distributed.small_runs import worst_error
from galvatron.core.errors import DataError
from galvatron.models import spec_of
from galvatron.parallelize import init_world, parallelize
from galvatron.plan import Plan
from galvatron.testing.models import tiny_model
from galvatron.testing.plans import SEQ_LEN, pure_plans, random_plans
from galvatron.testing.pool import Pool
from galvatron.train.data import IGNORED_LABEL

LENGTHS = ((16,), (5, 11), (1, 1, 6, 8), (9, 7), (15, 1), (2, 13, 1), (8, 8), (4, 4, 4, 4))
"""Of the documents in each row of a batch: inside, at and across the cuts of a sequence, and of one token."""
FAMILIES = {"llama": 1, "mistral": 1, "gpt2": 1, "gemma2": 1, "gpt_oss": 1}
"""And how many mixes of each the default run takes: rotary and learnt positions, windows, capped scores, sinks."""
PURE = ("tp", "ulysses", "ring", "full", "1f1b", "zero_bubble")
RANKS_AT_ONCE = 12
"""Of the plans in a call of the pool, which has a limit of time, all together."""


def packed_batch(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    lengths = [LENGTHS[row % len(LENGTHS)] for row in range(rows)]
    generator = torch.Generator().manual_seed(3)
    ids, labels = torch.randint(0, 97, (2, rows, SEQ_LEN), generator=generator)
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORED_LABEL
    return ids, labels, positions


@cache
def truth(family: str, rows: int) -> tuple[torch.nn.Module, float]:
    """Plain transformers with gradients of the mean over all counted tokens, and that loss; a call a document."""
    plain, (ids, labels, positions) = tiny_model(family), packed_batch(rows)
    total = torch.zeros(())
    for row in range(rows):
        begins = [*positions[row].eq(0).nonzero().flatten().tolist(), SEQ_LEN]
        for start, stop in pairwise(begins):
            logits = plain(ids[None, row, start:stop], use_cache=False).logits[0]
            total = total + F.cross_entropy(logits, labels[row, start:stop], reduction="sum")
    loss = total / (labels != IGNORED_LABEL).sum()
    loss.backward()
    return plain, loss.item()


def deviations(plans: list[tuple[str, Plan]]) -> list[tuple[str, str, list[float]]]:
    """Of loss, gradients and evaluation, of each family under its plan."""
    world, found = init_world("cpu"), []
    for family, plan in plans:
        model = parallelize(tiny_model(family), plan, world=world)
        ids, labels, positions = packed_batch(plan.global_batch_size)
        plain, loss = truth(family, plan.global_batch_size)
        errors = [abs(float(model.train_step(ids, labels, position_ids=positions)) / loss - 1)]
        errors.append(worst_error(model, plain))
        errors.append(abs(float(model.evaluate(ids, labels, position_ids=positions)) / loss - 1))
        found.append((family, plan.describe(), errors))
    return found


def check(pool: Pool, plans: list[tuple[str, Plan]], world_size: int) -> None:
    at_once = max(1, RANKS_AT_ONCE // world_size)
    for first in range(0, len(plans), at_once):
        for found in pool.run(deviations, plans[first : first + at_once], world_size=world_size):
            for family, plan, errors in found:
                assert errors == pytest.approx([0.0] * 3, abs=1e-5), f"{family}: {plan}"


def plans_of(family: str, world_size: int, count: int) -> list[tuple[str, Plan]]:
    spec = spec_of(tiny_model(family))
    mixes = random_plans(spec, world_size, count, seed=5)
    rings = [plan for plan in mixes if any(layer.cp > 1 for layer in plan.layers)]
    return [(family, plan) for plan in mixes if family != "gemma2" or plan not in rings]  # a ring caps no scores


def test_documents_of_a_row_are_as_if_alone(pool: Pool) -> None:
    every = pure_plans(spec_of(tiny_model("llama")), 4)
    pure = [("llama", every[name]) for name in PURE]
    mixes = [pair for family, count in FAMILIES.items() for pair in plans_of(family, 4, count)]
    check(pool, [*pure, *mixes], 4)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_documents_are_apart_under_mixes_of_every_size(pool: Pool, family: str, world_size: int) -> None:
    check(pool, plans_of(family, world_size, 12), world_size)


def test_wrong_positions_are_refused_and_whole_rows_are_as_without() -> None:
    spec = spec_of(tiny_model("llama"))
    plan = next(iter(pure_plans(spec, 1).values()))
    model = parallelize(tiny_model("llama"), plan, world=init_world("cpu"))
    ids, labels, positions = packed_batch(plan.global_batch_size)
    wrong = positions.clone()
    wrong[1, 6] = 0
    wrong[1, 7] = 5
    with pytest.raises(DataError, match=r"position_ids\[1, 7\]=5 must be 0, where a document begins, or 1; count"):
        model.train_step(ids, labels, position_ids=wrong)
    whole = torch.arange(SEQ_LEN).expand(ids.shape)
    assert float(model.evaluate(ids, labels, position_ids=whole)) == pytest.approx(float(model.evaluate(ids, labels)))
