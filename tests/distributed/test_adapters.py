"""Fine-tuning with LoRA from a checkpoint: one command, resumed under another plan, exported for peft and merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from galvatron.core.lora import Lora
from galvatron.models.lora import attach_lora
from galvatron.parallelize import init_world, parallelize
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing.models import draw_weights, tiny_model
from galvatron.testing.pool import Pool, WorkerError
from galvatron.train import read_metrics
from jobs import job_text

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own

BASE = """path = "base"
weights = true
lora = { r = 4, lora_alpha = 16, target_modules = ["q_proj", "down_proj"] }"""
ONE, CUT, SHARDED = LayerStrategy(), LayerStrategy(tp=2), LayerStrategy(dp_shard=2, zero=3)
IDS = torch.arange(40).view(2, 20)


def plan_for(stages: tuple[int, ...], *layers: LayerStrategy, microbatches: int = 1) -> Plan:
    ends = layers[0].model_copy(update={"recompute": "none"})
    return Plan(
        model="tiny", world_size=2, layers_per_stage=stages, num_microbatches=microbatches, embedding=ends,
        layers=layers, head=ends, global_batch_size=4, seq_len=16,
    )  # fmt: skip


@torch.no_grad()
def difference(model: nn.Module, other: nn.Module) -> float:
    """Of logits, relative to the largest."""
    logits, others = model(IDS).logits, other(IDS).logits
    return float((logits - others).abs().max() / others.abs().max())


def losses(run: str) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(Path(run) / "metrics.jsonl") if "loss" in row}


def test_from_a_checkpoint_to_peft(
    tmp_path: Path, galvatron: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    base = tiny_model("llama", vocab_size=257)
    base.save_pretrained("base")
    Path("job.toml").write_text(job_text(BASE, lr=1e-2, save_every=2))
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    plan_for((4,), SHARDED, CUT, SHARDED, CUT).save("mixed.json")
    plan_for((1, 3), *(ONE,) * 4, microbatches=2).save("pipeline.json")
    middle = "whole/checkpoints/step-000002"

    assert galvatron("train", "job.toml", "--plan", "mixed.json", "--run-dir", "whole") == 0
    assert galvatron("train", "job.toml", "--plan", "pipeline.json", "--resume", middle) == 0
    whole, resumed = losses("whole"), losses("runs/job")
    assert whole[4] < whole[1] - 0.05
    assert resumed[4] == pytest.approx(whole[4], rel=1e-4)
    other = ("train", "job.toml", "--plan", "mixed.json", "--run-dir", "other", "--resume", middle, "--lora", "r=5")
    assert galvatron(*other) == 2
    assert "was trained with lora=r=4,lora_alpha=16,target_modules=q_proj+down_proj" in capfd.readouterr().err

    assert galvatron("convert", "to-hf", "runs/job", "merged") == 0
    assert galvatron("convert", "to-hf", "runs/job", "adapter", "--adapter-only") == 0
    assert json.loads(Path("adapter/adapter_config.json").read_text())["base_model_name_or_path"].endswith("base")
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter")
    merged = AutoModelForCausalLM.from_pretrained("merged")
    assert difference(merged, base) > 0.01
    assert difference(merged, adapted) < 1e-5
    before, after = base.state_dict(), merged.state_dict()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "down_proj"}, "all else stays bit for bit"


def exported(plan: Plan, family: str, folder: Path) -> None:
    model = tiny_model(family)
    attach_lora(model, Lora(r=3, lora_alpha=6))
    draw_weights(model, 1)
    parallel = parallelize(model, plan, world=init_world("cpu"))
    parallel.save_pretrained(folder / "merged")
    parallel.save_pretrained(folder / "adapter", adapter_only=True)


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_exports_of_a_cut_model_are_what_peft_computes(pool: Pool, family: str, tmp_path: Path) -> None:
    pool.run(exported, plan_for((4,), CUT, SHARDED, CUT, SHARDED), family, tmp_path, world_size=2)
    model = tiny_model(family)
    attach_lora(model, Lora(r=3, lora_alpha=6))
    draw_weights(model, 1)
    assert difference(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), model) < 1e-5
    alone = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    own = peft.get_peft_model_state_dict(model)
    assert {name.removeprefix("base_model.model."): value.tolist() for name, value in alone.items()} == {
        name: value.tolist() for name, value in own.items()
    }


def alone_beside_norms(plan: Plan, folder: Path) -> None:
    model = tiny_model("llama")
    attach_lora(model, Lora(r=3))
    draw_weights(model, 1)  # alike on all ranks, whatever they have drawn before
    model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    parallelize(model, plan, world=init_world("cpu")).save_pretrained(folder / "alone", adapter_only=True)


def test_an_adapter_that_is_not_all_that_was_trained_is_not_written_alone(pool: Pool, tmp_path: Path) -> None:
    plan = plan_for((4,), *(CUT,) * 4)
    with pytest.raises(WorkerError, match=r"an adapter alone would lack 1 trained parameters .* input_layernorm"):
        pool.run(alone_beside_norms, plan, tmp_path, world_size=2)
    assert not (tmp_path / "alone").exists()


def dropped(plan: Plan) -> list[float]:
    model = tiny_model("llama")
    attach_lora(model, Lora(r=3, lora_dropout=0.5))
    draw_weights(model, 1)
    parallel = parallelize(model, plan, world=init_world("cpu"))
    tokens = torch.randint(97, (4, 17), generator=torch.Generator().manual_seed(0))
    batch = tokens[:, :-1], tokens[:, 1:]
    first, again = float(parallel.train_step(*batch)), float(parallel.train_step(*batch))
    return [first, again, float(parallel.grad_norm()), float(parallel.evaluate(*batch))]


def test_dropout_of_adapters_is_drawn_anew_every_step_and_not_when_recomputed(pool: Pool) -> None:
    kept = pool.run(dropped, plan_for((4,), *(CUT,) * 4), world_size=2)[0]
    layers = (CUT.model_copy(update={"recompute": level}) for level in ("full", "selective", "mlp", "linears"))
    recomputed = pool.run(dropped, plan_for((4,), *layers), world_size=2)
    assert recomputed[0] == pytest.approx(kept, rel=1e-5)
    first, again, _, evaluated = kept
    assert abs(first - again) > 1e-3
    assert abs(first - evaluated) > 1e-3
