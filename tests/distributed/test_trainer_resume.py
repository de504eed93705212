"""Training on gloo ranks: bit-exact resume, resume under other plans and worlds, and export."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from galvatron.core.errors import CheckpointError
from galvatron.core.job import TrainSection
from galvatron.models import auto_class
from galvatron.parallelize import init_world, parallelize
from galvatron.parallelize.processes.ranks import rank
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing.models import tiny_config, tiny_model
from galvatron.testing.pool import Pool, WorkerError
from galvatron.train import Dataset, Reporter, StepMetrics, StreamRows, checkpoint_to_hf, read_metrics, train
from galvatron.train.checkpoint import TrainState, is_weight
from galvatron.train.index import CheckpointIndex, read_tensor

BATCH, SEQ_LEN = 4, 16
TOKENS = np.random.RandomState(0).randint(0, 97, size=3000)

TP2 = LayerStrategy(tp=2, dp_shard=2, zero=2)
TP4 = LayerStrategy(tp=4)
ZERO3 = LayerStrategy(dp_shard=4, zero=3, recompute="full")
HSDP = LayerStrategy(dp_shard=2, dp_replicate=2, zero=1)
PAIR_TP, PAIR_ZERO3, PAIR_DP = LayerStrategy(tp=2), LayerStrategy(dp_shard=2, zero=3), LayerStrategy(dp_replicate=2)
EXPERTS, FOUR_EXPERTS = LayerStrategy(tp=2, ep=2, dp_replicate=2), LayerStrategy(ep=2, dp_shard=4, zero=3)
HOSTED_TP, HOSTED_ZERO3, HOSTED_EXPERTS = (
    strategy.model_copy(update={"offload": "optimizer"}) for strategy in (TP4, PAIR_ZERO3, EXPERTS)
)
PAIR_EXPERTS = LayerStrategy(ep=2, dp_shard=2, zero=2)
ONE = LayerStrategy()


def _plan(
    world_size: int, stages: tuple[int, ...], ends: LayerStrategy, *layers: LayerStrategy, m: int = 1, **changes: Any
) -> Plan:
    return Plan(
        model="tiny", world_size=world_size, layers_per_stage=stages, num_microbatches=m, embedding=ends, layers=layers,
        head=ends, global_batch_size=BATCH, seq_len=SEQ_LEN, **changes,
    )  # fmt: skip


PLANS = {
    "mixed": _plan(4, (4,), TP2, HOSTED_TP, ZERO3, HSDP, TP2),
    "pipeline": _plan(4, (1, 3), PAIR_TP, PAIR_ZERO3, PAIR_TP, PAIR_DP, PAIR_ZERO3, m=2),
    "interleaved": _plan(
        4, (1, 1, 1, 1), PAIR_TP, PAIR_ZERO3, PAIR_TP, PAIR_DP, PAIR_ZERO3, m=2, schedule="interleaved", model_chunks=2
    ),
    "pair": _plan(2, (4,), HOSTED_ZERO3, PAIR_TP, PAIR_DP, HOSTED_ZERO3, PAIR_TP),
    "experts": _plan(4, (4,), HSDP, HOSTED_EXPERTS, FOUR_EXPERTS, ZERO3, EXPERTS),
    "experts elsewhere": _plan(
        4, (1, 3), PAIR_DP, LayerStrategy(ep=2, dp_replicate=2), PAIR_EXPERTS, PAIR_TP, PAIR_EXPERTS, m=2
    ),
    "one": _plan(1, (4,), ONE, ONE, ONE, ONE, ONE, m=2),
    "within the decoder": _plan(2, (3, 1), ONE, ONE, ONE, ONE, ONE, m=2),
    "stacks in one": _plan(2, (4,), PAIR_TP, PAIR_TP, PAIR_ZERO3, PAIR_TP, PAIR_DP),
}


class AnsweredRows(StreamRows):
    """Rows of an encoder, which reads them backwards, and a decoder."""

    def gather(self, rows: Sequence[int], draws: Sequence[object]) -> dict[str, torch.Tensor]:
        batch = super().gather(rows, draws)
        return {**batch, "input_ids": batch["input_ids"].flip(1), "decoder_input_ids": batch["input_ids"]}


def _run(family: str, tied: bool, plan: Plan, run_dir: Path, settings: dict[str, Any], options: dict[str, Any]) -> int:
    """On every rank: train a tiny model, whose first weights differ where it resumes; the steps done."""
    # a key's bias has a gradient of pure rounding, which AdamW with the usual eps would blow up to full steps
    section = TrainSection(global_batch_size=BATCH, seq_len=SEQ_LEN, lr=1e-3, eps=1e-4, **settings)
    family, *dropout = family.split(" with ")
    changes = {"resid_pdrop": 0.1, "embd_pdrop": 0.1} if dropout else {}
    config = tiny_config(family, tie_word_embeddings=tied, **changes)
    model = parallelize(tiny_model(config, seed=1 if "resume" in options else 0), plan, world=init_world("cpu"))
    rows = (AnsweredRows if family == "t5" else StreamRows)(TOKENS, SEQ_LEN)
    dataset = Dataset(rows, global_batch_size=BATCH, eval_fraction=0.05, fingerprint="x")
    export = options.pop("export", None)
    result = train(model, section, dataset, plan=plan, run_dir=run_dir, **options)
    if export is not None:
        model.save_pretrained(export, max_shard_bytes=20_000)
    return result.steps


def _train(
    pool: Pool,
    plan: str,
    run_dir: Path,
    *,
    family: str = "llama",
    tied: bool = False,
    num_steps: int = 6,
    **options: Any,
) -> list[int]:
    settings = {"num_steps": num_steps, "warmup_steps": 2}
    return pool.run(_run, family, tied, PLANS[plan], run_dir, settings, options, world_size=PLANS[plan].world_size)


def _losses(run_dir: Path) -> list[float]:
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, sum("loss" in row for row in rows) + 1))
    return [row["loss"] for row in rows if "loss" in row]


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    index = CheckpointIndex.load(checkpoint / "metadata.json")
    return {name: read_tensor(checkpoint, name, stored) for name, stored in index.tensors.items()}


@pytest.mark.parametrize(("plan", "family"), [("mixed", "llama"), ("pipeline", "gpt2 with dropout")])
def test_the_same_plan_resumes_bit_for_bit_over_20_steps(pool: Pool, tmp_path: Path, plan: str, family: str) -> None:
    _train(pool, plan, tmp_path / "straight", family=family, num_steps=20)
    _train(pool, plan, tmp_path / "cut", family=family, num_steps=20, stop_after=9)
    _train(pool, plan, tmp_path / "cut", family=family, num_steps=20, resume="latest")
    assert _losses(tmp_path / "cut") == _losses(tmp_path / "straight")
    ours, theirs = (_tensors(tmp_path / name / "checkpoints" / "step-000020") for name in ("cut", "straight"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("family", "first", "second"),
    [
        ("llama", "mixed", "pipeline"),
        ("gpt2", "interleaved", "mixed"),
        ("gpt_bigcode", "pipeline", "pair"),
        ("qwen2", "pair", "mixed"),
        ("gpt2", "mixed", "one"),
        ("qwen3_moe", "experts", "experts elsewhere"),
        ("t5", "within the decoder", "stacks in one"),
    ],
)
def test_another_plan_or_world_resumes_within_tolerance(
    pool: Pool, tmp_path: Path, family: str, first: str, second: str
) -> None:
    tied = family not in ("llama", "qwen3_moe")
    _train(pool, first, tmp_path / "straight", family=family, tied=tied)
    _train(pool, first, tmp_path / "cut", family=family, tied=tied, stop_after=3)
    _train(pool, second, tmp_path / "other", family=family, tied=tied, resume=tmp_path / "cut")
    rows = read_metrics(tmp_path / "other" / "metrics.jsonl")
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(_losses(tmp_path / "straight")[3:], rel=1e-5)
    ours, theirs = (_tensors(tmp_path / name / "checkpoints" / "step-000006") for name in ("other", "straight"))
    for name, expected in theirs.items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=2e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")  # of older releases' GPT-BigCode
@pytest.mark.parametrize(
    ("family", "tied", "plan"),
    [
        ("llama", True, "interleaved"),
        ("llama", False, "pipeline"),
        ("gpt_bigcode", True, "pipeline"),
        ("mixtral", False, "experts"),
        ("t5", True, "within the decoder"),
    ],
)
def test_exports_load_with_from_pretrained_and_give_equal_logits(
    pool: Pool, tmp_path: Path, family: str, tied: bool, plan: str
) -> None:
    _train(pool, plan, tmp_path, family=family, tied=tied, num_steps=2, export=tmp_path / "hf")
    checkpoint_to_hf(tmp_path / "checkpoints" / "step-000002", tmp_path / "offline")
    config = tiny_config(family, tie_word_embeddings=tied)
    reference = auto_class(config).from_config(config)
    weights = {n: t for n, t in _tensors(tmp_path / "checkpoints" / "step-000002").items() if is_weight(n)}
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) == (set(reference.all_tied_weights_keys) if tied else set())
    ids = torch.arange(20).reshape(2, 10)
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids.flip(0)} if config.is_encoder_decoder else {})}
    expected = reference.eval()(**inputs).logits
    for directory in (tmp_path / "hf", tmp_path / "offline"):
        loaded = auto_class(config).from_pretrained(directory)
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded.eval()(**inputs).logits, expected)
        assert json.loads((directory / "config.json").read_text())["architectures"] == [type(loaded).__name__]
    shards = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 1
    stored = {name for shard in shards for name in load_file(tmp_path / "hf" / shard)}
    assert stored == weights.keys() == load_file(tmp_path / "offline" / "model.safetensors").keys()


def _skip_on_a_nan_of_one_rank(run_dir: Path) -> tuple[int, str, list[float]]:
    """On every rank: train three steps, the second of which has a NaN in one rank's gradient."""
    model = parallelize(tiny_model("llama", seed=0), PLANS["pair"], world=init_world("cpu"))
    original, calls = model.train_step, []

    def train_step(input_ids: torch.Tensor, labels: torch.Tensor, **terms: float) -> torch.Tensor:
        loss = original(input_ids, labels)
        calls.append(float(loss))
        if len(calls) == 2 and rank() == 1:
            gradient = model.local_parameters[-1].tensor.grad
            assert gradient is not None
            gradient.view(-1)[0] = torch.nan
        return loss

    model.train_step = train_step  # type: ignore[method-assign]
    section = TrainSection(global_batch_size=BATCH, seq_len=SEQ_LEN, num_steps=3, lr=1e-3, max_skipped_steps=1)
    dataset = Dataset(StreamRows(TOKENS, SEQ_LEN), global_batch_size=BATCH, fingerprint="x")
    result = train(model, section, dataset, plan=PLANS["pair"], run_dir=run_dir)
    return result.steps, (run_dir / "metrics.jsonl").read_text(), calls


def test_a_nan_on_one_rank_is_skipped_by_all(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(_skip_on_a_nan_of_one_rank, tmp_path, world_size=2)
    assert first == second
    assert '{"step": 2, "skipped": "the gradient norm is nan"}' in first[1]
    state = TrainState.load(tmp_path / "checkpoints" / "step-000003" / "state.json")
    assert (state.step, state.skipped_steps) == (3, 1)
    tensors = _tensors(tmp_path / "checkpoints" / "step-000003")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_signal_to_one_rank_ends_all_of_them_after_the_same_step(pool: Pool, tmp_path: Path) -> None:
    steps = _train(pool, "mixed", tmp_path, reporter=StopOneRank())
    assert steps == [2, 2, 2, 2]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000002\n"


class StopOneRank(Reporter):
    """After the first step rank 0, which alone reports, gets SIGTERM."""

    def stepped(self, metrics: StepMetrics) -> None:
        if metrics.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_truncated_checkpoint_is_one_error_on_every_rank(pool: Pool, tmp_path: Path) -> None:
    _train(pool, "mixed", tmp_path, num_steps=2)
    file = tmp_path / "checkpoints" / "step-000002" / "rank-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(WorkerError, match=r"CheckpointError: .*rank-00002\.safetensors must have \d+ bytes"):
        _train(pool, "mixed", tmp_path, num_steps=4, resume="latest")


def test_an_export_that_fails_on_rank_0_fails_on_every_rank(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "precious").touch()
    with pytest.raises(WorkerError, match="must be a new or empty folder"):
        _train(pool, "mixed", tmp_path, num_steps=2, export=tmp_path / "hf")
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["precious"]


def test_an_offline_export_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"metadata\.json does not exist"):
        checkpoint_to_hf(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
