"""Dropout: masks of their own on every rank, equal where work is done twice, and none of the caller's draws touched."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from galvatron.core.model import RECOMPUTES
from galvatron.models import build_spec
from galvatron.parallelize import ParallelModel, World, init_world, parallelize
from galvatron.plan import Plan
from galvatron.testing.models import tiny_config, tiny_model
from galvatron.testing.plans import pure_plans
from galvatron.testing.pool import Pool
from galvatron.testing.reference import Recipe, make_batches

RATE = 0.25
PLANS = {name: plan for name, plan in pure_plans(build_spec(tiny_config("gpt2")), 4).items() if plan.layers[0].cp == 1}
"""Ring attention refuses dropout."""
LIKE_ANOTHER = {"zero1", "hsdp1", "hsdp3", "gpipe", "offload"}
"""What draws as zero2, hsdp2, 1f1b and zero3 do."""
CUT_BY_BATCH = [name for name, plan in PLANS.items() if plan.pp == plan.layers[0].sequence_degree == 1]


def model_for(plan: Plan, seed: int = 0, rate: float = RATE, world: World | None = None) -> ParallelModel:
    model = tiny_model("gpt2", embd_pdrop=rate, resid_pdrop=rate, attn_pdrop=rate)
    return parallelize(model, plan, world=world or init_world("cpu"), seed=seed)


def batch(plan: Plan) -> tuple[Tensor, Tensor]:
    size = (plan.global_batch_size, plan.seq_len + 1)
    tokens = torch.randint(0, 97, size, generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def losses_of(world: World, plan: Plan, rate: float = RATE) -> list[float]:
    model = model_for(plan, rate=rate, world=world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, eps=1e-4)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)  # as everyone does, on every rank
        losses.append(float(model.train_step(*batch(plan))))
        optimizer.step()
    return losses


def losses_under_every_strategy() -> tuple[dict[str, list[float]], list[float]]:
    world = init_world("cpu")
    plans = {name: plan for name, plan in PLANS.items() if name not in LIKE_ANOTHER}
    return {name: losses_of(world, plan) for name, plan in plans.items()}, losses_of(world, PLANS["dp"], rate=0.0)


def test_training_goes_on_under_every_strategy_and_recomputes_with_equal_masks(pool: Pool) -> None:
    results = pool.run(losses_under_every_strategy, world_size=4)
    assert all(result == results[0] for result in results)
    losses, plain = results[0]
    alike = set(CUT_BY_BATCH) - LIKE_ANOTHER
    assert {*RECOMPUTES[1:], "zero3", "hsdp2"} < alike < set(losses)
    for name, values in losses.items():
        assert all(math.isfinite(value) for value in values), name
        assert abs(values[0] - plain[0]) < 0.3, name
        assert values[0] != pytest.approx(plain[0], rel=1e-4), name
        assert values[-1] < values[0] - 0.1, name
    for name in alike:  # the same rows on the same ranks: only what draws masks anew would differ
        assert losses[name] == pytest.approx(losses["dp"], rel=1e-5), name


def masks_of_a_rank(plan: Plan, seed: int) -> list[bytes]:
    """Which elements were dropped, for every call of every dropout of two steps on this rank's own layers."""
    model, masks = model_for(plan, seed), []
    own = model.stages[0].decoder.h[plan.chunk_layers(model.grid.stage)[0]]

    def note(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        dropped = (output == 0) & (args[0] != 0)
        assert float(dropped.float().mean()) == pytest.approx(RATE, abs=0.1)
        masks.append(dropped.numpy().tobytes())

    for dropout in (own.attn.resid_dropout, own.mlp.dropout):
        dropout.register_forward_hook(note)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for _ in range(2):
        model.train_step(*batch(plan))
    assert torch.equal(torch.get_rng_state(), before)
    return masks


@pytest.mark.parametrize("strategy", ["dp", "tp", "zero3", "1f1b"])
def test_no_two_masks_are_equal_on_any_rank_microbatch_or_step(pool: Pool, strategy: str) -> None:
    plan = PLANS[strategy]
    ranks = pool.run(masks_of_a_rank, plan, 0, world_size=4)
    masks = list(itertools.chain(*ranks))
    assert len(masks) == 4 * 2 * 2 * plan.num_microbatches
    assert len(set(masks)) == len(masks)
    if strategy == "dp":
        assert pool.run(masks_of_a_rank, plan, 0, world_size=4) == ranks
        assert not set(itertools.chain(*pool.run(masks_of_a_rank, plan, 1, world_size=4))) & set(masks)


def modes() -> tuple[list[float], float, float]:
    model = model_for(PLANS["tp"])
    evaluated = float(model.evaluate(*batch(PLANS["tp"])))
    assert model.training
    still = float(model.eval().train_step(*batch(PLANS["tp"])))
    assert not model.training
    model.evaluate(*batch(PLANS["tp"]))
    assert not model.training
    model.train()
    first = float(model.train_step(*batch(PLANS["tp"])))
    model.steps = 1
    return [first, float(model.train_step(*batch(PLANS["tp"])))], still, evaluated


def test_eval_draws_none_and_a_step_is_told_by_its_number(pool: Pool) -> None:
    for (first, again), still, evaluated in pool.run(modes, world_size=4):
        assert still == pytest.approx(evaluated, rel=1e-6)
        assert first != pytest.approx(still, rel=1e-4)
        assert again == first


def masks_in_windows(plan: Plan) -> tuple[list[bytes], list[float]]:
    """What three layers of a Swin drop in two steps, elements and whole samples; and the losses."""
    config = tiny_config("swin", hidden_dropout_prob=RATE, drop_path_rate=0.5)
    model, masks = parallelize(tiny_model(config), plan, world=init_world("cpu"), seed=0), []

    def note(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        masks.append(((output == 0) & (args[0] != 0)).numpy().tobytes())

    for index in (1, 3, 6) if not any(layer.recompute == "full" for layer in plan.layers) else ():
        model.stages[0].layer(index).dropout.register_forward_hook(note)
        model.stages[0].layer(index).drop_path.register_forward_hook(note)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(plan.global_batch_size, 3, 20, 20, generator=generator)
    labels = torch.randint(5, (plan.global_batch_size,), generator=generator)
    return masks, [float(model.train_step(pixel_values=images, labels=labels)) for _ in range(2)]


def test_layers_of_windows_drop_alike_on_all_ranks_that_see_them_whole(pool: Pool) -> None:
    plan = pure_plans(build_spec(tiny_config("swin")), 2)["tp"]
    (masks, losses), other = pool.run(masks_in_windows, plan, world_size=2)
    assert other == (masks, losses)
    assert len(masks) == 2 * plan.num_microbatches * 3 * 3  # dropout runs twice a layer, paths are dropped once
    assert len(set(masks)) > len(masks) // 2  # of four samples several are dropped alike now and then
    full = tuple(layer.model_copy(update={"recompute": "full"}) for layer in plan.layers)
    again = pool.run(masks_in_windows, plan.model_copy(update={"layers": full}), world_size=2)
    assert again[0][1] == pytest.approx(losses, rel=1e-6)


def paths_dropped(plan: Plan) -> tuple[list[list[bool]], list[float]]:
    """Whose paths a DINOv2's second layer drops in two steps; and the losses."""
    config = tiny_config("dinov2", drop_path_rate=0.5)
    model, dropped = parallelize(tiny_model(config), plan, world=init_world("cpu"), seed=0), []

    def note(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        dropped.append((output == 0).flatten(1).all(dim=1).tolist())

    if not any(layer.recompute == "full" for layer in plan.layers):
        model.stages[0].layer(1).drop_path.register_forward_hook(note)
    inputs, labels = make_batches(Recipe(num_steps=1), config, plan.global_batch_size, plan.seq_len)[0]
    return dropped, [float(model.train_step(labels=labels, **inputs)) for _ in range(2)]


@pytest.mark.parametrize("axis", ["tp", "ulysses"])
def test_ranks_that_share_sequences_drop_the_paths_of_the_same_samples(pool: Pool, axis: str) -> None:
    plan = pure_plans(build_spec(tiny_config("dinov2")), 2)[axis]
    (dropped, losses), other = pool.run(paths_dropped, plan, world_size=2)
    assert other == (dropped, losses)
    assert {kept for microbatch in dropped for kept in microbatch} == {True, False}
    full = tuple(layer.model_copy(update={"recompute": "full"}) for layer in plan.layers)
    again = pool.run(paths_dropped, plan.model_copy(update={"layers": full}), world_size=2)
    assert again[0][1] == pytest.approx(losses, rel=1e-6)
