"""Router biases move under any plan as in one process, and stay with the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from distributed.small_runs import worst_error
from galvatron.core.errors import ConfigError
from galvatron.core.job import TrainSection
from galvatron.models import meta_model
from galvatron.models.buffers import lasting_buffers
from galvatron.parallelize import init_world, parallelize
from galvatron.parallelize.state.weights import SafetensorsWeights
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing.models import tiny_config, tiny_model
from galvatron.testing.pool import Pool
from galvatron.train import Dataset, StreamRows, train
from galvatron.train.index import CheckpointIndex, read_tensor

RATE, STEPS, ROWS, SEQ_LEN = 0.2, 3, 12, 16
DEALT, AGAIN = LayerStrategy(ep=2, dp_replicate=2), LayerStrategy(dp_shard=2, zero=3, recompute="full")


def plan_for(stages: tuple[int, ...], *layers: LayerStrategy, **changes: Any) -> Plan:
    ends = LayerStrategy(dp_replicate=4 // len(stages) if "model_chunks" not in changes else 2)
    return Plan(
        model="x", world_size=4, layers_per_stage=stages, embedding=ends, layers=layers, head=ends,
        global_batch_size=ROWS, seq_len=SEQ_LEN, **changes,
    )  # fmt: skip


PLANS = (
    plan_for(
        (4,),
        LayerStrategy(dp_replicate=4),
        LayerStrategy(tp=2, ep=2, dp_replicate=2, recompute="full"),
        LayerStrategy(cp=2, dp_shard=2, zero=3, recompute="selective"),
        LayerStrategy(ep=4, ulysses=2, dp_shard=2, zero=2),
        num_microbatches=3,
    ),
    plan_for((1, 3), DEALT.model_copy(update={"ep": 1}), AGAIN, DEALT, AGAIN, num_microbatches=3),  # no experts in one
    plan_for(
        (1, 1, 1, 1), DEALT.model_copy(update={"ep": 1}), AGAIN, DEALT, AGAIN,
        num_microbatches=2, schedule="interleaved", model_chunks=2,
    ),
)  # fmt: skip


def batches() -> list[tuple[Tensor, Tensor]]:
    drawn = torch.randint(0, 97, (STEPS, 2, ROWS, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    return [(ids, labels) for ids, labels in drawn]


def truth() -> torch.nn.Module:
    """Plain transformers after the steps: gradients of the last, biases moved after all."""
    plain, counts = tiny_model("deepseek_v3"), dict[torch.nn.Module, Tensor]()

    def count(router: torch.nn.Module, _: object, output: tuple[Tensor, ...]) -> None:
        counts[router] = torch.bincount(output[2].flatten(), minlength=4)

    for layer in plain.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(count)
    for ids, labels in batches():
        plain.zero_grad()
        F.cross_entropy(plain(ids, use_cache=False).logits.flatten(0, 1), labels.flatten()).backward()
        for router, chosen in counts.items():
            for expert, rows in enumerate(chosen.tolist()):
                mean = 2 * ROWS * SEQ_LEN / 4
                router.e_score_correction_bias[expert] += RATE * ((rows < mean) - (rows > mean))
    return plain


def deviations(folder: Path) -> list[tuple[float, float, float]]:
    """Of every plan: gradients, biases, and how far biases moved; the last plan's model is written to ``folder``."""
    plain, start, found = truth(), lasting_buffers(tiny_model("deepseek_v3")), []
    for plan in PLANS:
        model = parallelize(tiny_model("deepseek_v3"), plan, world=init_world("cpu"))
        for ids, labels in batches():
            model.train_step(ids, labels)
            gradients = worst_error(model, plain)  # of the last step in the end
            model.evaluate(ids, labels)  # counts nothing
            model.move_router_biases(RATE)
        wanted = lasting_buffers(plain)
        own = {p.name: p.tensor for p in model.local_parameters if p.name in wanted}
        errors = [float((own[name] - wanted[name]).abs().max()) for name in own]
        moved = [float((wanted[name] - start[name]).abs().max()) for name in own]
        found.append((gradients, max(errors, default=0.0), min(moved, default=RATE)))
    model.save_pretrained(folder / "saved")
    again = parallelize(
        meta_model(tiny_config("deepseek_v3")),
        PLANS[1],
        weights=SafetensorsWeights(folder / "saved"),
        world=init_world("cpu"),
    )
    kept = [float((p.tensor - wanted[p.name]).abs().max()) for p in again.local_parameters if p.name in wanted]
    found.append((0.0, max(kept, default=0.0), RATE))
    return found


def test_biases_move_and_are_kept_as_in_one_process(pool: Pool, tmp_path: Path) -> None:
    for found in pool.run(deviations, tmp_path, world_size=4):
        for gradient, bias, moved in found:
            assert gradient < 1e-5
            assert bias < 1e-6
            assert moved > RATE / 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, bias in lasting_buffers(truth()).items():
        assert torch.allclose(lasting_buffers(loaded)[name], bias, atol=1e-6)


def trained(plan: Plan, run_dir: Path, options: dict[str, Any]) -> None:
    model = parallelize(tiny_model("deepseek_v3", num_hidden_layers=2), plan, world=init_world("cpu"))
    stream = np.random.RandomState(0).randint(0, 97, size=2000)
    dataset = Dataset(StreamRows(stream, SEQ_LEN), global_batch_size=ROWS, fingerprint="x")
    section = TrainSection(
        global_batch_size=ROWS, seq_len=SEQ_LEN, num_steps=5, lr=1e-3, eps=1e-4, router_bias_rate=RATE
    )
    train(model, section, dataset, plan=plan, run_dir=run_dir, **options)


def test_biases_go_on_under_another_plan_bit_for_bit(pool: Pool, tmp_path: Path) -> None:
    whole, cut = LayerStrategy(dp_replicate=2), LayerStrategy(tp=2, recompute="full")
    ends = {"model": "x", "world_size": 2, "global_batch_size": ROWS, "seq_len": SEQ_LEN}
    dealt = LayerStrategy(ep=2, dp_shard=2, zero=3)
    first = Plan(layers_per_stage=(2,), embedding=whole, layers=(whole, dealt), head=whole, **ends)
    second = Plan(layers_per_stage=(2,), embedding=whole, layers=(whole, cut), head=whole, num_microbatches=2, **ends)
    pool.run(trained, first, tmp_path / "straight", {}, world_size=2)
    pool.run(trained, first, tmp_path / "cut", {"stop_after": 2}, world_size=2)
    pool.run(trained, second, tmp_path / "cut", {"resume": "latest"}, world_size=2)
    steps = [("straight", 5), ("cut", 2), ("cut", 5)]  # of an odd number of moves, which cannot cancel
    at_the_end, before, again = (biases(tmp_path / name / "checkpoints" / f"step-{step:06}") for name, step in steps)
    assert torch.equal(again, at_the_end)
    assert float((again - before).abs().max()) > RATE / 2


def biases(checkpoint: Path) -> Tensor:
    stored = CheckpointIndex.load(checkpoint / "metadata.json").tensors
    (name,) = (name for name in stored if "e_score_correction_bias" in name)
    return read_tensor(checkpoint, name, stored[name])


def test_routers_without_biases_are_left_alone() -> None:
    one = LayerStrategy()
    fields = {"world_size": 1, "layers_per_stage": (4,), "global_batch_size": 2, "seq_len": SEQ_LEN}
    plan = Plan(model="x", embedding=one, layers=(one,) * 4, head=one, **fields)
    model = parallelize(tiny_model("mixtral"), plan, world=init_world("cpu"))
    with pytest.raises(ConfigError, match="have no biases that even out loads"):
        model.move_router_biases(RATE)
