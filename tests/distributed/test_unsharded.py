"""Units that nothing shards, alone: when their sum starts, in which dtype it travels, what their buffers take."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tests.distributed.small_runs import REPLICAS, batch
from torch import Tensor, nn

from galvatron.parallelize import init_world, parallelize
from galvatron.parallelize.sharding.unsharded import UnshardedUnit
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing.models import tiny_model
from galvatron.testing.pool import Pool

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FP32, BF16 = torch.float32, torch.bfloat16
CPU = torch.device("cpu")


class Toy(nn.Module):
    """An embedding [8, 4], a linear [4, 4] and a head [8, 4]."""

    def __init__(self, *, is_tied: bool = False, freeze: tuple[str, ...] = ()) -> None:
        super().__init__()
        with torch.device("meta"):
            self.embedding, self.middle = nn.Embedding(8, 4), nn.Linear(4, 4, bias=False)
            self.head = nn.Linear(4, 8, bias=False)
        if is_tied:
            self.head.weight = self.embedding.weight
        for name in freeze:
            self.get_submodule(name).requires_grad_(False)

    def unit(
        self, dtype: torch.dtype = FP32, reduce: torch.dtype = FP32, replicas: dist.ProcessGroup | None = None
    ) -> UnshardedUnit:
        """One unit of all of it, with values that bf16 holds exactly."""
        unit = UnshardedUnit([self], dtype, reduce, CPU, replicas)
        unit.master.copy_(torch.arange(unit.master.numel()).remainder(7).sub(3) / 4)
        return unit

    def forward(self, ids: Tensor) -> Tensor:
        """[T] → the sum of logits [T, 8]."""
        out: Tensor = self.head(self.middle(self.embedding(ids))).sum()
        return out


def sums_in_order(patch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, int]]:
    """(dtype, elements) of every all-reduce from here on."""
    seen: list[tuple[torch.dtype, int]] = []
    original = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: object, **kwargs: object) -> object:
        seen.append((tensor.dtype, tensor.numel()))
        return original(tensor, *args, **kwargs)  # type: ignore[arg-type]

    patch.setattr(dist, "all_reduce", all_reduce)
    return seen


def replicas() -> tuple[dist.ProcessGroup, int]:
    world = init_world("cpu")
    return world.group((0, 1), "gradients"), world.rank


def step(unit: UnshardedUnit, *losses: Tensor) -> None:
    """A step from zero after all forwards: the backwards, and the end."""
    for local in unit._locals.values():
        local.grad = None
    unit.begin()
    for index, loss in enumerate(losses):
        unit.before_backward(is_last=index == len(losses) - 1)
        loss.backward()
    unit.finish()


def skips_a_parameter() -> tuple[list[tuple[torch.dtype, int]], Tensor, Tensor]:
    group, rank = replicas()
    toy = Toy()
    unit = toy.unit(replicas=group)
    unit.refresh()
    with pytest.MonkeyPatch.context() as patch:
        seen = sums_in_order(patch)
        step(unit, (toy.embedding.weight * (rank + 1)).sum() + toy.head.weight.sum())  # the middle has no part in it
        embedding = unit.local(toy.embedding.weight).grad
        first = embedding.clone() if embedding is not None else torch.empty(0)
        step(unit, toy.embedding.weight.sum() + toy.middle.weight.sum() + toy.head.weight.sum())
        step(unit, toy.embedding.weight.sum())
    gradients = [unit.local(p).grad for p in (toy.middle.weight, toy.head.weight)]
    assert all(gradient is not None for gradient in gradients)
    return seen, first, torch.cat([g.flatten() for g in gradients if g is not None])


def test_what_no_loss_depends_on_has_a_gradient_of_zero_and_holds_up_no_sum(pool: Pool) -> None:
    for seen, embedding, unused in pool.run(skips_a_parameter, world_size=2):
        assert seen == [(FP32, 80)] * 3
        assert torch.equal(embedding, torch.full((8, 4), 3.0))
        assert unused.numel() == 48  # also where an earlier step had left something
        assert not unused.any()


def sums_microbatches(dtype: torch.dtype, reduce: torch.dtype) -> tuple[list[tuple[torch.dtype, int]], Tensor, bool]:
    group, _ = replicas()
    toy = Toy()
    unit = toy.unit(dtype, reduce, group)
    unit.refresh()
    # 1, then eight times 2^-9: added up in bf16, each of these is lost in rounding
    parts = [1.0, *[2.0**-9] * 8]
    with pytest.MonkeyPatch.context() as patch:
        seen = sums_in_order(patch)
        step(unit, *(sum((p * part).sum() for p in toy.parameters()) for part in parts))
    gradient = unit.local(toy.middle.weight).grad
    assert gradient is not None
    unit.refresh()
    return seen, gradient, all(torch.equal(p.float(), unit.local(p)) for p in toy.parameters())


@pytest.mark.parametrize(("dtype", "reduce"), [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"), ("fp32", "bf16")])
def test_microbatches_add_up_in_float32_and_travel_once_as_the_plan_says(pool: Pool, dtype: str, reduce: str) -> None:
    for seen, gradient, is_fresh in pool.run(sums_microbatches, DTYPES[dtype], DTYPES[reduce], world_size=2):
        assert seen == [(DTYPES[reduce], 80)]
        assert gradient.dtype == FP32
        assert torch.equal(gradient, torch.full((4, 4), 2 * (1 + 2.0**-6)))
        assert is_fresh  # whatever the copy of the weights was lent for


@pytest.mark.parametrize(
    ("dtype", "reduce", "bytes_a_parameter"), [(FP32, FP32, 8), (BF16, FP32, 10), (BF16, BF16, 10)]
)
def test_bytes_a_parameter(dtype: torch.dtype, reduce: torch.dtype, bytes_a_parameter: int) -> None:
    toy = Toy()
    unit = toy.unit(dtype, reduce)
    assert sum(t.nbytes for t in (unit.master, *unit.buffers())) == 80 * bytes_a_parameter
    buffer = unit.buffers()[0].data_ptr()
    for _ in range(2):
        unit.refresh()
        step(unit, toy(torch.arange(8)))
        gradients = [unit.local(p).grad for p in toy.parameters()]
        assert min(g.data_ptr() for g in gradients if g is not None) == buffer  # used again by every step
        assert all(p.grad is None for p in toy.parameters())


def freezes(dtype: torch.dtype) -> None:
    group, _ = replicas()
    toy = Toy(freeze=("embedding", "head"))
    unit = toy.unit(dtype, dtype, group)
    frozen = [unit.local(m.weight).clone() for m in (toy.embedding, toy.head)]
    unit.refresh()
    with pytest.MonkeyPatch.context() as patch:
        seen = sums_in_order(patch)
        step(unit, toy(torch.arange(8)))
        assert seen == [(dtype, 16)]  # the trained part alone
    assert unit.buffers()[0].numel() == 16
    for module, before in zip((toy.embedding, toy.head), frozen, strict=True):
        assert unit.local(module.weight).grad is None
        assert not unit.local(module.weight).requires_grad
        assert torch.equal(module.weight.float(), before)  # the sum that borrows the copy leaves this part alone
    expected = frozen[1].sum(dim=0)[:, None] * frozen[0].sum(dim=0)[None, :] * 2
    gradient = unit.local(toy.middle.weight).grad
    assert gradient is not None
    assert torch.allclose(gradient, expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_frozen_parts_have_no_gradient_and_stay(pool: Pool, dtype: str) -> None:
    pool.run(freezes, DTYPES[dtype], world_size=2)


def test_a_unit_without_trained_parts_sums_nothing() -> None:
    toy = Toy(freeze=("embedding", "middle", "head"))
    unit = toy.unit()
    step(unit)
    assert [buffer.numel() for buffer in unit.buffers()] == [0]


def ties() -> None:
    group, _ = replicas()
    toy, alone = Toy(is_tied=True), Toy(is_tied=True)
    unit, truth = toy.unit(replicas=group), alone.unit()
    assert len(unit.master) == 48  # once, not twice
    assert unit.local(toy.head.weight) is unit.local(toy.embedding.weight)
    unit.refresh()
    truth.refresh()
    with pytest.MonkeyPatch.context() as patch:
        seen = sums_in_order(patch)
        step(unit, toy(torch.arange(6)), toy(torch.arange(2, 8)))
        assert seen == [(FP32, 48)]
    tied, middle = torch.autograd.grad(
        alone(torch.arange(6)) + alone(torch.arange(2, 8)), [alone.head.weight, alone.middle.weight]
    )
    for parameter, expected in ((toy.head.weight, tied), (toy.middle.weight, middle)):
        gradient = unit.local(parameter).grad
        assert gradient is not None
        assert torch.allclose(gradient, 2 * expected)


def test_a_tied_weight_is_held_once_and_has_the_gradient_of_both_its_uses(pool: Pool) -> None:
    pool.run(ties, world_size=2)


def test_the_sum_of_a_unit_that_sends_back_waits_for_the_message() -> None:
    toy = Toy()
    unit = toy.unit()
    started: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unit, "_start_sum", lambda: started.append(True))
        unit.begin()
        for is_last in (False, True):
            unit.before_backward(is_last=is_last, sends_back=True)
            toy(torch.arange(8)).backward()
            assert not started
            unit.count_arrival()  # the message is on its way
            assert bool(started) == is_last


def accumulates_in_bf16() -> float:
    """How far the gradient of a call is from what it adds to large ones, relative to its largest."""
    layers = (REPLICAS, LayerStrategy(tp=2), REPLICAS, LayerStrategy(dp_shard=2, zero=2))
    plan = Plan(
        model="tiny", world_size=2, layers_per_stage=(4,), embedding=REPLICAS, layers=layers, head=REPLICAS,
        precision="bf16", grad_reduce_dtype="bf16", num_microbatches=1, global_batch_size=4, seq_len=16,
    )  # fmt: skip
    model = parallelize(tiny_model("gpt2"), plan, world=init_world("cpu"))
    tokens, labels = batch(1)
    model.train_step(tokens, labels)
    alone = [p.tensor.grad.clone() for p in model.local_parameters if p.tensor.grad is not None]
    for parameter in model.local_parameters:
        parameter.tensor.grad = torch.full_like(parameter.tensor, 64.0)
    model.train_step(tokens, labels, accumulate=True)
    both = [p.tensor.grad for p in model.local_parameters if p.tensor.grad is not None]
    errors = [(b - 64.0 - a).abs().max() for a, b in zip(alone, both, strict=True)]
    return float(max(errors))


def test_calls_add_up_in_float32_whatever_travels(pool: Pool) -> None:
    assert max(pool.run(accumulates_in_bf16, world_size=2)) < 64 * 2**-20
