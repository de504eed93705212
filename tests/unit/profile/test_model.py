from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from galvatron.core.model_profile import ComputeSample
from galvatron.models import build_spec
from galvatron.profile.layers import _batches
from galvatron.profile.model import _median, _shapes, _stacked_degrees
from galvatron.profile.timing import Budget
from galvatron.profile.units import UnitShape


@pytest.mark.parametrize(
    ("world_size", "degrees"), [(1, (1,)), (4, (1, 2, 4)), (6, (1, 2, 3, 6)), (12, (1, 2, 3, 4, 6, 12))]
)
def test_degrees_of_every_stage_size(world_size, degrees):
    assert _stacked_degrees(world_size) == degrees


def test_degrees_that_a_unit_cannot_be_cut_by_are_left_out():
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=100,
        max_position_embeddings=16,
    )
    shapes = _shapes(UnitShape(config, build_spec(config), "embedding", 1, 16, torch.float32), (1, 2, 3, 4))
    assert [(shape.name, shape.tp) for shape in shapes] == [
        *(("embedding", tp) for tp in (1, 2, 4)),  # 3 does not divide the sequence
        *(("head", tp) for tp in (1, 2, 4)),
        *(("layer", tp) for tp in (1, 2)),  # nor 4 the heads
    ]


@pytest.mark.parametrize(("max_batch", "batches"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_batches_double_and_end_with_the_largest(max_batch, batches):
    assert list(_batches(max_batch)) == batches


def _sample(batch: int, forward_s: float, backward_s: float) -> ComputeSample:
    return ComputeSample(unit="layer", tp=1, batch=batch, seq_len=8, forward_s=forward_s, backward_s=backward_s)


def test_sweeps_become_medians_and_a_batch_of_one_sweep_stays():
    sweeps = [_sample(1, 1.0, 9.0), _sample(1, 5.0, 2.0), _sample(2, 7.0, 8.0), _sample(1, 2.0, 3.0)]
    assert _median(sweeps) == [_sample(1, 2.0, 3.0), _sample(2, 7.0, 8.0)]


def test_a_budget_hands_on_what_is_left_and_never_less_than_nothing():
    budget = Budget(100.0, 4)
    assert budget.next_share() == pytest.approx(25, abs=1)
    assert budget.next_share() == pytest.approx(100 / 3, abs=1)  # the first task took no time
    spent = Budget(-1.0, 2)
    assert [spent.next_share(), spent.next_share(), spent.next_share()] == [0, 0, 0]
