"""fp8 products, emulated on CPUs: beside bf16, and the same under any cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import PreTrainedModel

from galvatron.core.model import Precision
from galvatron.parallelize import ParallelModel, init_world, parallelize
from galvatron.parallelize.layers import compile, fp8
from galvatron.plan import LayerStrategy, Plan
from galvatron.profile import profile_model
from galvatron.testing.models import tiny_config, tiny_model
from galvatron.testing.pool import Pool

pytest.importorskip("torchao")

# 16 divides all of them by tp 2; rows are cut beside a bias
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, "mlp_bias": True}
ONE, TP2, ZERO3 = LayerStrategy(), LayerStrategy(tp=2), LayerStrategy(dp_shard=2, zero=3, recompute="selective")


def plan_for(world_size: int, stages: tuple[int, ...], *layers: LayerStrategy, microbatches: int = 1) -> Plan:
    ends = layers[-1].model_copy(update={"recompute": "none"})
    return Plan(
        model="tiny", world_size=world_size, layers_per_stage=stages, embedding=ends, layers=layers, head=ends,
        num_microbatches=microbatches, global_batch_size=4, seq_len=16, precision="bf16",
    )  # fmt: skip


ALONE = plan_for(1, (4,), *(ONE,) * 4)
PLANS = {
    "mixed": plan_for(2, (4,), TP2, ZERO3, TP2, LayerStrategy(dp_replicate=2)),
    "pipeline": plan_for(2, (1, 3), *(ONE,) * 4, microbatches=2),
}


@contextmanager
def emulated() -> Iterator[None]:
    backend, fp8.EMULATED = compile.BACKEND, True
    try:
        yield
    finally:
        compile.BACKEND, fp8.EMULATED = backend, False


def model_of() -> PreTrainedModel:
    return tiny_model("llama", **SIZES)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(97, (4, 17), generator=torch.Generator().manual_seed(step % 2))
    return tokens[:, :-1], tokens[:, 1:]


def curve(
    plan: Plan, in_fp8: bool, num_steps: int, precision: Precision = "bf16", engine: str | None = None
) -> tuple[list[float], float]:
    """Losses, and the first gradient's norm."""
    plan = plan.model_copy(update={"precision": precision})
    with emulated():
        compile.BACKEND = engine or compile.BACKEND
        model: ParallelModel = parallelize(
            model_of(), plan, world=init_world("cpu"), compile=engine is not None, fp8=in_fp8
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses, norms = [], []
    for step in range(num_steps):
        losses.append(float(model.train_step(*batch(step))))
        norms.append(float(model.clip_grad_norm_(1.0)))
        optimizer.step()
    return losses, norms[0]


def test_the_loss_stays_beside_that_of_bf16(pool: Pool) -> None:
    (found,), (bf16,) = (pool.run(curve, ALONE, in_fp8, 40, world_size=1) for in_fp8 in (True, False))
    assert found[0] != bf16[0]
    assert bf16[0][-1] < 0.5 * bf16[0][0]
    assert found[0] == pytest.approx(bf16[0], abs=0.25)  # a layer of 64 averages little rounding out


@pytest.mark.parametrize("name", PLANS)
def test_any_cut_computes_what_one_process_does(pool: Pool, name: str) -> None:
    """In float32 beside products, so that float8 alone rounds: alike under every cut, as scales are powers of two."""
    (alone,) = pool.run(curve, ALONE, True, 3, "fp32", world_size=1)
    (plain,) = pool.run(curve, ALONE, False, 3, "fp32", world_size=1)
    for losses, norm in pool.run(curve, PLANS[name], True, 3, "fp32", world_size=2):
        assert losses == pytest.approx(alone[0], rel=2e-5)
        assert norm == pytest.approx(alone[1], rel=2e-5)
        assert losses != pytest.approx(plain[0], rel=5e-4)
        assert norm != pytest.approx(plain[1], rel=5e-3)


@pytest.mark.slow
def test_compiled_layers_compute_the_same(pool: Pool) -> None:
    """Without making code of graphs, which takes minutes."""
    eager = pool.run(curve, PLANS["mixed"], True, 3, "fp32", world_size=2)
    compiled = pool.run(curve, PLANS["mixed"], True, 3, "fp32", "aot_eager", world_size=2, timeout_s=900)
    for (losses, norm), (expected, expected_norm) in zip(compiled, eager, strict=True):
        assert losses == pytest.approx(expected, rel=2e-5)
        assert norm == pytest.approx(expected_norm, rel=2e-5)


def profiles() -> tuple[bool, list[int], float]:
    config = tiny_config("llama", **SIZES)
    with emulated():
        found = profile_model(
            config, init_world("cpu"), seq_len=16, precision="bf16", tp_degrees=(1, 2, 4), budget_s=1.0, fp8=True
        )
    return found.fp8, list(found.tp_degrees()), found.compute[-1].forward_s


def test_it_is_measured_where_it_can_run(pool: Pool) -> None:
    ((in_fp8, degrees, forward_s),) = pool.run(profiles, world_size=1)
    assert (in_fp8, degrees) == (True, [1, 2])  # 8 rows of keys a rank with tp 4
    assert forward_s > 0
