"""The backward of zero bubble in two passes: as many matrix products as 1F1B's, and none of them twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from galvatron.core.model import RECOMPUTES, Recompute
from galvatron.internals import TorchDispatchMode
from galvatron.parallelize import init_world, parallelize
from galvatron.plan import LayerStrategy, Plan
from galvatron.plan.plan import Schedule
from galvatron.testing.models import tiny_model
from galvatron.testing.pool import Pool

M, ROWS, SEQ_LEN = 3, 2, 16
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")


class Products(TorchDispatchMode):
    """Within, how many matrix products run."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func.__name__.partition(".")[0] in PRODUCTS
        return func(*args, **(kwargs or {}))


def plan_for(schedule: Schedule, strategy: LayerStrategy) -> Plan:
    ends = strategy.model_copy(update={"recompute": "none"})
    return Plan(
        model="tiny", world_size=2 * strategy.num_devices, layers_per_stage=(1, 3), schedule=schedule,
        num_microbatches=M, global_batch_size=M * ROWS, seq_len=SEQ_LEN, embedding=ends, layers=(strategy,) * 4,
        head=ends,
    )  # fmt: skip


def batch(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(vocab_size, (M * ROWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def products(family: str, plan: Plan) -> int:
    model = parallelize(tiny_model(family), plan, world=init_world("cpu"))
    tokens = batch(model.spec.vocab_size)
    with Products() as counted:
        model.train_step(*tokens)
    return counted.number


@pytest.mark.parametrize(
    ("family", "recompute"),
    [*((name, "none") for name in ("gpt2", "phi3", "gpt_neox")), *(("llama", level) for level in RECOMPUTES)],
)
def test_a_step_makes_no_product_twice(pool: Pool, family: str, recompute: Recompute) -> None:
    strategy = LayerStrategy(recompute=recompute)
    schedules: tuple[Schedule, ...] = ("1f1b", "zero_bubble")
    plain, split = (pool.run(products, family, plan_for(schedule, strategy), world_size=2) for schedule in schedules)
    linears = 7 if family == "llama" else 4
    assert split == plain
    if recompute == "none":
        # forward, and two in backward; at the head two and one, all in forward
        assert split == [3 * linears * M, (3 * 3 * linears + 3) * M]
