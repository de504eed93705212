"""parallelize: where weights come from, precision, evaluation and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from galvatron.core.errors import CheckpointError, DataError
from galvatron.models import meta_model
from galvatron.parallelize import ParallelModel, SafetensorsWeights, init_world, parallelize
from galvatron.parallelize.state.pieces import box
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing.models import tiny_config, tiny_model
from galvatron.testing.pool import Pool

MIXED = (
    LayerStrategy(tp=2, dp_shard=2, zero=3),
    LayerStrategy(dp_shard=2, dp_replicate=2, zero=2),
    LayerStrategy(tp=4),
    LayerStrategy(dp_shard=4, zero=1, recompute="full"),
)


def plan_for(world_size: int, precision: str = "fp32", reduce: str = "fp32", **changes: object) -> Plan:
    alone = LayerStrategy()
    ends = LayerStrategy(tp=2, dp_shard=2, zero=3) if world_size == 4 else alone
    fields = {
        "model": "tiny",
        "world_size": world_size,
        "layers_per_stage": (4,),
        "num_microbatches": 2,
        "global_batch_size": 8,
        "seq_len": 16,
        "precision": precision,
        "grad_reduce_dtype": reduce,
        "embedding": ends,
        "head": ends,
        "layers": MIXED if world_size == 4 else (alone,) * 4,
    }
    return Plan.model_validate({**fields, **changes})


def batch(vocab_size: int = 97) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, vocab_size, (8, 17), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def mismatches(model: ParallelModel, whole: dict[str, torch.Tensor]) -> list[str]:
    return [
        p.name
        for p in model.local_parameters
        for piece in p.pieces
        if not torch.equal(
            box(p.tensor, piece.local_offset, piece.size), box(whole[p.name], piece.global_offset, piece.size)
        )
    ]


def start_from_seed(world_size: int) -> float:
    model = parallelize(meta_model(tiny_config("gpt2")), plan_for(world_size), seed=5)
    assert not any(p.tensor.is_meta for p in model.local_parameters)
    return float(model.train_step(*batch()))


def test_initial_weights_do_not_depend_on_the_plan(pool: Pool) -> None:
    alone = pool.run(start_from_seed, 1, world_size=1)[0]
    for loss in pool.run(start_from_seed, 4, world_size=4):
        assert loss == pytest.approx(alone, rel=1e-6)


def load_slices(directory: str, prefix: str) -> list[str]:
    weights = SafetensorsWeights(directory, base_prefix=prefix)
    model = parallelize(meta_model(tiny_config("gpt2")), plan_for(4), weights=weights)
    return mismatches(model, dict(tiny_model("gpt2", seed=1).named_parameters()))


@pytest.mark.parametrize("part", ["whole model", "base model"])
def test_sharded_safetensors_load_straight_into_shards(pool: Pool, tmp_path: Path, part: str) -> None:
    model = tiny_model("gpt2", seed=1)
    saved = model if part == "whole model" else model.transformer
    saved.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert pool.run(load_slices, str(tmp_path), "transformer", world_size=4) == [[]] * 4


def load_broken(directory: str) -> str:
    try:
        parallelize(
            meta_model(tiny_config("gpt2")), plan_for(1), world=init_world("cpu"), weights=SafetensorsWeights(directory)
        )
    except CheckpointError as error:
        return str(error)
    return "loaded"


def load_on_four(directory: str) -> str:
    try:
        parallelize(meta_model(tiny_config("llama")), plan_for(4), weights=SafetensorsWeights(directory))
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_a_nan_that_one_rank_reads_is_the_same_error_on_all(pool: Pool, tmp_path: Path) -> None:
    model = tiny_model("llama")
    name = "model.layers.3.mlp.up_proj.weight"
    model.get_parameter(name).data[-1, -1] = torch.nan
    model.save_pretrained(tmp_path)
    expected = f"weights of {name} hold NaN or inf (in fp32, which training keeps); give sound weights"
    assert pool.run(load_on_four, str(tmp_path), world_size=4) == [expected] * 4


def test_broken_checkpoints_are_refused(pool: Pool, tmp_path: Path) -> None:
    assert "has no model.safetensors" in pool.run(load_broken, str(tmp_path), world_size=1)[0]
    tiny_model("gpt2", n_embd=16).save_pretrained(tmp_path)
    assert "has shape" in pool.run(load_broken, str(tmp_path), world_size=1)[0]
    tiny_model("gpt2", vocab_size=128).save_pretrained(tmp_path)  # larger: no box of the model lies outside
    assert (
        "wte.weight has shape [128, 32] in the weights but [97, 32]"
        in pool.run(load_broken, str(tmp_path), world_size=1)[0]
    )
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "cannot be read" in pool.run(load_broken, str(tmp_path), world_size=1)[0]


def step_in(world_size: int, precision: str, reduce: str) -> tuple[float, float, float]:
    model = parallelize(tiny_model("llama"), plan_for(world_size, precision, reduce))
    loss = model.train_step(*batch())
    norm = model.clip_grad_norm_(0.5)
    assert all(p.tensor.grad is not None and p.tensor.grad.dtype == torch.float32 for p in model.local_parameters)
    return float(loss), float(norm), float(model.clip_grad_norm_(None))


@pytest.mark.parametrize("reduce", ["fp32", "bf16"])
def test_bf16_stays_near_fp32_and_clipping_clips(pool: Pool, reduce: str) -> None:
    loss, norm, _ = pool.run(step_in, 1, "fp32", "fp32", world_size=1)[0]
    for low_loss, low_norm, clipped in pool.run(step_in, 4, "bf16", reduce, world_size=4):
        assert low_loss == pytest.approx(loss, rel=2e-2)  # bf16 has 8 bits
        assert low_norm == pytest.approx(norm, rel=5e-2)
        assert low_loss != loss
        assert clipped == pytest.approx(0.5, rel=1e-4)


def evaluate_between_steps() -> tuple[float, float, float]:
    model = parallelize(tiny_model("llama"), plan_for(4))
    before = model.train_step(*batch())
    with torch.no_grad():
        for parameter in model.local_parameters:
            parameter.tensor.mul_(0.9)
    return float(before), float(model.evaluate(*batch())), float(model.train_step(*batch()))


def test_evaluation_sees_the_current_weights(pool: Pool) -> None:
    for before, evaluated, after in pool.run(evaluate_between_steps, world_size=4):
        assert evaluated == pytest.approx(after, rel=1e-6)
        assert evaluated != pytest.approx(before, rel=1e-3)


def wrong_shape() -> None:
    model = parallelize(tiny_model("llama"), plan_for(1), world=init_world("cpu"))
    ids, labels = batch()
    with pytest.raises(DataError, match=r"the plan's shape \[8, 16\] on every rank, got input_ids of \[4, 16\]"):
        model.train_step(ids[:4], labels[:4])


def test_a_batch_of_another_shape_is_refused(pool: Pool) -> None:
    pool.run(wrong_shape, world_size=1)
