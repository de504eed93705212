"""Batches that ranks do not share, or that no rank may be given: one error on all of them."""

from __future__ import annotations

import pytest
import torch

from galvatron.core.errors import ConfigError, DataError, PlanError
from galvatron.parallelize import ParallelModel, init_world, parallelize
from galvatron.parallelize.checks.batch import AGREEMENT_EVERY
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing.models import tiny_model
from galvatron.testing.pool import Pool

DATA_PARALLEL, STAGES = LayerStrategy(dp_replicate=2), LayerStrategy()


def plan_for(strategy: LayerStrategy, seq_len: int = 16) -> Plan:
    stages = 2 // strategy.num_devices
    return Plan(
        model="tiny", world_size=2, layers_per_stage=(4 // stages,) * stages, num_microbatches=2, embedding=strategy,
        layers=(strategy,) * 4, head=strategy, global_batch_size=4, seq_len=seq_len,
    )  # fmt: skip


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 97, (4, 17), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def message(model: ParallelModel, method: str, ids: torch.Tensor, labels: torch.Tensor, **settings: int) -> str:
    with pytest.raises(DataError) as caught:
        getattr(model, method)(ids, labels, **settings)
    return str(caught.value)


def give_each_rank_its_own() -> list[str]:
    world = init_world("cpu")
    model = parallelize(tiny_model("llama"), plan_for(DATA_PARALLEL), world=world)
    ids, labels = batch()
    found = [message(model, method, *batch(world.rank)) for method in ("train_step", "evaluate")]
    found.append(message(model, "train_step", ids, labels.roll(world.rank)))
    found.append(message(model, "train_step", ids, labels, num_tokens=64 + world.rank))
    bad = ids.clone()
    bad[3, 2] = 97 if world.rank else 0
    found.append(message(model, "train_step", bad, labels))
    model.train_step(ids, labels)  # after all that, a batch of all still trains
    for _ in range(AGREEMENT_EVERY - 1):
        model._check.train_batches.weight({"input_ids": ids}, labels)
    found.append(message(model, "train_step", *batch(world.rank)))
    return found


def test_rank_local_batches_are_one_error_on_all_ranks(pool: Pool) -> None:
    first, second = pool.run(give_each_rank_its_own, world_size=2)
    assert first == second
    for text in first:
        assert "every rank must be given the same global batch" in text
        assert "those of rank 1 differ from those of rank 0" in text


def give_bad_ids(strategy: LayerStrategy) -> list[str]:
    model = parallelize(tiny_model("llama"), plan_for(strategy), world=init_world("cpu"))
    ids, labels = batch()
    found = []
    for value in (-1, 97, 500):
        bad = ids.clone()
        bad[1, 3] = value
        found += [message(model, method, bad, labels) for method in ("train_step", "evaluate")]
        found += [message(model, method, ids, bad) for method in ("train_step", "evaluate")]
    found.append(message(model, "train_step", ids.int(), labels))
    assert all(part.tensor.grad is None for part in model.local_parameters)
    return found


@pytest.mark.parametrize("strategy", [DATA_PARALLEL, STAGES], ids=str)
def test_ids_outside_the_vocabulary_are_one_error_on_all_ranks(pool: Pool, strategy: LayerStrategy) -> None:
    first, second = pool.run(give_bad_ids, strategy, world_size=2)
    assert first == second
    assert all("is not among the model's 97 ids" in text for text in first[:-1])
    assert "must be int64, got int32" in first[-1]


def steps_with_strided_batches() -> list[float]:
    model = parallelize(tiny_model("llama"), plan_for(DATA_PARALLEL), world=init_world("cpu"))
    ids, labels = batch()
    turned = ids.T.contiguous().T, labels.T.contiguous().T
    return [float(model.train_step(ids, labels)), float(model.train_step(*turned))]


def test_a_batch_of_any_stride_gives_the_same_loss(pool: Pool) -> None:
    for plain, turned in pool.run(steps_with_strided_batches, world_size=2):
        assert turned == plain


def different_models() -> list[str]:
    world = init_world("cpu")
    found = []
    for seed, drawn, microbatches in ((world.rank, 0, 2), (0, world.rank, 2), (0, 0, 1 + world.rank)):
        plan = plan_for(DATA_PARALLEL).model_copy(update={"num_microbatches": microbatches})
        model = tiny_model("llama", drawn)
        with pytest.raises(ConfigError) as caught:
            parallelize(model, plan, world=world, seed=seed)
        found.append(str(caught.value))
    with pytest.raises(ConfigError) as caught:
        parallelize(tiny_model("llama" if world.rank else "qwen2"), plan_for(DATA_PARALLEL), world=world)
    return [*found, str(caught.value)]


def test_ranks_with_models_of_their_own_are_one_error_on_all(pool: Pool) -> None:
    first, second = pool.run(different_models, world_size=2)
    assert first == second
    for text, what in zip(first, ("seed", "weights", "plan", "model"), strict=True):
        assert f"every rank must be given the same {what}, but rank 1 has other than rank 0" in text


def beyond_the_positions() -> str:
    with pytest.raises(PlanError) as caught:
        parallelize(tiny_model("gpt2"), plan_for(DATA_PARALLEL, seq_len=128), world=init_world("cpu"))
    return str(caught.value)


def test_a_sequence_beyond_the_models_positions_is_refused(pool: Pool) -> None:
    for text in pool.run(beyond_the_positions, world_size=2):
        assert "seq_len=128 must be from 1 to max_seq_len=64" in text
