from __future__ import annotations

import copy
import math

import pytest
import torch
from train_fakes import section, whole_part

from galvatron.train.optimizer import build_optimizer, lr_at, set_lr, set_update_count, update


def test_warmup_rises_to_lr_and_never_from_zero() -> None:
    train = section(num_steps=20, warmup_steps=4, lr=1.0)
    assert [lr_at(step, train) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_is_half_way_in_the_middle_and_ends_at_min_lr() -> None:
    train = section(num_steps=20, lr=1.0, min_lr=0.2, lr_schedule="cosine")
    assert lr_at(0, train) == 1.0
    assert lr_at(10, train) == pytest.approx(0.6)
    assert lr_at(5, train) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert lr_at(20, train) == pytest.approx(0.2)
    assert lr_at(99, train) == pytest.approx(0.2)


def test_linear_falls_evenly_after_warmup() -> None:
    train = section(num_steps=12, warmup_steps=2, lr=1.0, lr_schedule="linear")
    assert [lr_at(step, train) for step in (2, 7, 12)] == pytest.approx([1.0, 0.5, 0.0])


def test_constant_stays() -> None:
    train = section(num_steps=12, lr=0.5, lr_schedule="constant")
    assert {lr_at(step, train) for step in range(12)} == {0.5}


def test_wsd_is_stable_then_decays() -> None:
    train = section(num_steps=20, warmup_steps=2, decay_steps=4, lr=1.0, min_lr=0.1, lr_schedule="wsd")
    assert {lr_at(step, train) for step in range(2, 17)} == {1.0}
    assert lr_at(18, train) == pytest.approx(0.55)
    assert lr_at(20, train) == pytest.approx(0.1)


def test_only_globally_one_dimensional_parameters_escape_decay() -> None:
    matrix, norm = whole_part("w", torch.ones(3, 2)), whole_part("norm", torch.ones(3))
    optimizer = build_optimizer([matrix, norm], section(weight_decay=0.5))
    set_lr(optimizer, 0.1)
    matrix.tensor.grad, norm.tensor.grad = torch.zeros(3, 2), torch.zeros(3)
    optimizer.step()
    assert torch.equal(norm.tensor, torch.ones(3))
    assert torch.allclose(matrix.tensor, torch.full((3, 2), 0.95))


def test_it_is_adamw_and_its_update_count_can_be_set() -> None:
    ours, theirs = whole_part("w", torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    optimizer = build_optimizer([ours], section())
    reference = torch.optim.AdamW([theirs], lr=0.05, betas=(0.9, 0.95), weight_decay=0.1)
    for gradient in (torch.full((2, 2), 0.3), torch.full((2, 2), -0.7)):
        ours.tensor.grad, theirs.grad = gradient, gradient.clone()
        optimizer.step()
        reference.step()
    assert torch.allclose(ours.tensor, theirs, rtol=1e-6, atol=0)
    set_update_count(optimizer, 7)
    assert float(optimizer.state[ours.tensor]["step"]) == 7


def test_an_empty_shard_can_step() -> None:
    part = whole_part("w", torch.empty(0, 2))
    optimizer = build_optimizer([part], section())
    part.tensor.grad = torch.empty(0, 2)
    optimizer.step()


def test_frozen_parameters_have_no_state_and_stay() -> None:
    trained, frozen = whole_part("a", torch.ones(2, 2)), whole_part("b", torch.ones(2))
    frozen.tensor.requires_grad_(False)
    optimizer = build_optimizer([trained, frozen], section())
    assert list(optimizer.state) == [trained.tensor]
    trained.tensor.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(frozen.tensor, torch.ones(2))
    build_optimizer([frozen], section()).step()  # a rank may hold nothing else


@pytest.mark.parametrize("max_norm", [0.5, 100.0, None])
def test_an_update_clips_as_torch_does_and_skips_what_is_not_finite(max_norm: float | None) -> None:
    parts = [whole_part("w", torch.randn(5, 7)), whole_part("b", torch.randn(7))]
    twins = copy.deepcopy(parts)
    train, (ours, theirs) = section(), ([p.tensor for p in which] for which in (parts, twins))
    optimizer, reference = build_optimizer(parts, train), build_optimizer(twins, train)
    for defect in (None, "loss", None, "norm"):
        for own, other in zip(ours, theirs, strict=True):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.clone()
        loss, norm = torch.tensor(1.0), torch.nn.utils.get_total_norm([p.grad for p in ours])
        if defect is None:
            torch.nn.utils.clip_grad_norm_(theirs, max_norm or math.inf)
            reference.step()
        loss, norm = (torch.tensor(math.nan) if name == defect else x for name, x in (("loss", loss), ("norm", norm)))
        update(optimizer, loss, norm, max_norm)
        for own, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-7)
            assert optimizer.state[own]["step"] == reference.state[other]["step"]
