"""fp16: gradients that overflow teach nothing on any rank, and an own loop needs no scaler of its own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distributed.small_runs import MIXED, PIPELINE, batch
from galvatron.core.errors import ConfigError
from galvatron.core.job import TrainSection
from galvatron.core.model import Precision
from galvatron.parallelize import ParallelModel, init_world, parallelize
from galvatron.parallelize.losses.scale import MOST_SCALE, LossScale
from galvatron.parallelize.processes.ranks import rank
from galvatron.plan import Plan
from galvatron.testing.models import tiny_model
from galvatron.testing.pool import Pool, WorkerError
from galvatron.train import Dataset, read_metrics, train
from galvatron.train.checkpoint import TrainState
from galvatron.train.rows import StreamRows

SCALE = 2.0**12
TOKENS = np.random.RandomState(0).randint(0, 97, size=3000)


def make(plan: Plan, precision: Precision = "fp16", scale: float = SCALE) -> ParallelModel:
    plan = plan.model_copy(update={"precision": precision})
    model = parallelize(tiny_model("gpt2"), plan, world=init_world("cpu"))
    if model.loss_scale is not None:
        model.loss_scale = LossScale(scale=scale)
    return model


def curve(model: ParallelModel, num_steps: int) -> list[float]:
    """Losses of an own loop that knows nothing of scales, on two batches in turn."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for step in range(num_steps):
        losses.append(float(model.train_step(*batch(step % 2))))
        model.clip_grad_norm_(1.0)
        optimizer.step()
    return losses


def curves(plan: Plan, num_steps: int) -> dict[str, list[float]]:
    return {precision: curve(make(plan, precision), num_steps) for precision in ("fp32", "bf16", "fp16")}


@pytest.mark.parametrize(
    ("plan", "num_steps"),
    [
        (PIPELINE, 16),
        pytest.param(PIPELINE, 40, marks=pytest.mark.slow),
        pytest.param(MIXED, 40, marks=pytest.mark.slow),
    ],
    ids=["pipeline", "pipeline, longer", "mixed"],
)
def test_losses_stay_beside_those_of_fp32(pool: Pool, plan: Plan, num_steps: int) -> None:
    found, *others = pool.run(curves, plan, num_steps, world_size=4)
    assert all(other == found for other in others)
    assert found["fp32"][-1] < found["fp32"][0] * (0.5 if num_steps == 40 else 0.8)
    for precision, allowed in (("fp16", 0.004), ("bf16", 0.02)):
        assert found[precision] == pytest.approx(found["fp32"], abs=allowed)


def overflows() -> tuple[list[float], float, list[bool]]:
    model = make(MIXED, scale=MOST_SCALE)
    before = {name: value.clone() for name, value in model.named_parameters()}
    norms, kept = [], []
    optimizer = torch.optim.AdamW(model.parameters())
    while not norms or not math.isfinite(norms[-1]):
        model.train_step(*batch(0))
        norms.append(float(model.clip_grad_norm_(1.0)))
        optimizer.step()
        kept.append(all(torch.equal(value, before[name]) for name, value in model.named_parameters()))
    assert model.loss_scale is not None
    return norms, model.loss_scale.scale, kept


def test_an_overflow_leaves_an_optimizer_nothing_to_do(pool: Pool) -> None:
    found, *others = pool.run(overflows, world_size=4)
    norms, scale, kept = found
    assert len(norms) > 10
    assert kept == [True] * (len(norms) - 1) + [False]
    assert scale == MOST_SCALE / 2 ** (len(norms) - 1)
    assert all(scale == other[1] and kept == other[2] for other in others)


def gradients(model: ParallelModel) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def added_up(plan: Plan) -> float:
    """How far gradients of two calls are from those of one; between them the loss scale is taken out, and another."""
    model, (ids, labels) = make(plan), batch(0)
    model.train_step(ids, labels)
    model.clip_grad_norm_(None)
    once = gradients(model)
    assert model.loss_scale is not None
    model.loss_scale = LossScale(scale=SCALE / 4)
    model.train_step(ids, labels, accumulate=True)
    model.train_step(ids, labels, accumulate=True)
    model.clip_grad_norm_(None)
    return max(
        float((thrice - 3 * once[name]).abs().max() / once[name].abs().max().clamp(min=1e-9))
        for name, thrice in gradients(model).items()
    )


@pytest.mark.parametrize("plan", [MIXED, PIPELINE], ids=["mixed", "pipeline"])
def test_calls_add_up_whatever_scale_they_were_made_under(pool: Pool, plan: Plan) -> None:
    assert max(pool.run(added_up, plan, world_size=4)) < 0.01


def forgets_to_unscale() -> None:
    model = make(MIXED)
    model.train_step(*batch(0))
    with pytest.raises(ConfigError, match=r"still carry fp16's loss scale of 4096; call the model's clip_grad_norm_"):
        model.train_step(*batch(0))
    model.zero_grad()
    model.train_step(*batch(0))


def test_gradients_that_carry_the_scale_are_not_lost_in_silence(pool: Pool) -> None:
    pool.run(forgets_to_unscale, world_size=4)


def trains(plan: Plan, run_dir: Path, num_steps: int, resume: str | None, poisoned: int, scale: float) -> str:
    """On every rank: the run's rows; in step ``poisoned`` one element of the last rank's gradients is inf."""
    model = make(plan, scale=scale)
    original = model.train_step

    def train_step(input_ids: torch.Tensor, labels: torch.Tensor, **terms: float) -> torch.Tensor:
        loss = original(input_ids, labels)
        if model.steps == poisoned and rank() == 3:
            gradient = model.local_parameters[-1].tensor.grad
            assert gradient is not None
            gradient.view(-1)[0] = torch.inf
        return loss

    model.train_step = train_step  # type: ignore[method-assign]
    section = TrainSection(global_batch_size=4, seq_len=16, num_steps=num_steps, lr=1e-3, precision="fp16")
    dataset = Dataset(StreamRows(TOKENS, 16), global_batch_size=4, fingerprint="x")
    train(model, section, dataset, plan=model.plan, run_dir=run_dir, resume=resume)
    return (run_dir / "metrics.jsonl").read_text()


def test_an_overflow_on_one_rank_is_skipped_by_all_and_the_scale_outlives_the_plan(pool: Pool, tmp_path: Path) -> None:
    first, *others = pool.run(trains, PIPELINE, tmp_path, 4, None, 2, SCALE, world_size=4)
    assert others == [first] * 3
    rows = [json.loads(line) for line in first.splitlines()]
    assert rows[1] == {"step": 2, "skipped": "the gradients overflow fp16 at a loss scale of 4096"}
    assert [row["loss_scale"] for row in rows if "loss" in row] == [SCALE, SCALE / 2, SCALE / 2]
    state = TrainState.load(tmp_path / "checkpoints" / "step-000004" / "state.json")
    assert (state.skipped_steps, state.skipped_in_a_row) == (1, 0)
    assert state.loss_scale == LossScale(scale=SCALE / 2, finite_steps=2)
    pool.run(trains, MIXED, tmp_path, 6, "latest", 0, SCALE, world_size=4)
    state = TrainState.load(tmp_path / "checkpoints" / "step-000006" / "state.json")
    assert state.loss_scale == LossScale(scale=SCALE / 2, finite_steps=4)
    assert all(row.get("loss_scale") == SCALE / 2 for row in read_metrics(tmp_path / "metrics.jsonl")[-2:])


def test_an_overflow_at_the_least_scale_is_no_fault_of_the_scale(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"GalvatronError: the gradient norm is inf at step 2, training cannot go on"):
        pool.run(trains, MIXED, tmp_path, 4, None, 2, 1.0, world_size=4)
