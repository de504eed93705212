"""Experts drop what is beyond their capacity under any plan as one process does that applies the rule by hand."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from distributed.small_runs import worst_error
from galvatron.core.errors import ConfigError
from galvatron.core.job import TrainSection
from galvatron.parallelize import init_world, parallelize
from galvatron.parallelize.layers import capacity
from galvatron.plan import LayerStrategy, Plan
from galvatron.testing.models import tiny_model
from galvatron.testing.pool import Pool
from galvatron.train import Dataset, StreamRows, read_metrics, train

FACTOR, ROWS, SEQ_LEN = 0.8, 8, 8
ALONE, TP, RING = LayerStrategy(), LayerStrategy(tp=2), LayerStrategy(cp=2)
DP, DEALT = LayerStrategy(dp_replicate=2), LayerStrategy(ep=2, dp_replicate=2)
ZERO3 = LayerStrategy(dp_shard=2, zero=3, recompute="full")
TURNS = LayerStrategy(ep=2, ulysses=2, recompute="selective")


def plan_for(world_size: int, ends: LayerStrategy, *layers: LayerStrategy, pp: int = 1, **changes: Any) -> Plan:
    return Plan(
        model="x", world_size=world_size, layers_per_stage=(len(layers) // pp,) * pp, embedding=ends, layers=layers,
        head=ends, **{"num_microbatches": 2, "global_batch_size": ROWS, "seq_len": SEQ_LEN, **changes},
    )  # fmt: skip


PLANS = (
    plan_for(2, DP, TP, TURNS),
    plan_for(2, DP, RING, DEALT),
    plan_for(2, DP, ZERO3, LayerStrategy(ulysses=2)),
    plan_for(2, DP, DEALT.model_copy(update={"recompute": "full"}), LayerStrategy(ep=2, cp=2, zero=2)),
    plan_for(2, ALONE, ALONE, ALONE.model_copy(update={"recompute": "full"}), pp=2),
)
OF_FOUR = (
    plan_for(
        4, LayerStrategy(dp_replicate=4), LayerStrategy(tp=2, cp=2), LayerStrategy(tp=2, ep=2, dp_shard=2, zero=3)
    ),
    plan_for(
        4, LayerStrategy(dp_replicate=4), LayerStrategy(ulysses=2, ep=4, dp_replicate=2), LayerStrategy(cp=4, ep=2)
    ),
    plan_for(4, DP, RING, DEALT, pp=2, schedule="zero_bubble"),
)


def tiny(family: str) -> PreTrainedModel:
    """Two layers, of experts; the first is dense in DeepSeek-V3."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gpt_oss" else {}
    return tiny_model(family, num_hidden_layers=2, **kinds)


def batch() -> tuple[Tensor, Tensor]:
    ids, labels = torch.randint(0, 97, (2, ROWS, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    return ids, labels


def truth(family: str, num_microbatches: int) -> tuple[PreTrainedModel, float, int, int]:
    """Plain transformers with the rule in a loop: a model with gradients, its loss, choices dropped and made."""
    plain, dropped, made = tiny(family), 0, 0

    def limited(forward: Any, number: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        nonlocal dropped, made
        most, taken, rows = math.ceil(FACTOR * index.numel() / number), [0] * number, [h * 0 for h in hidden]
        for token, choices in enumerate(index.tolist()):
            for place, expert in enumerate(choices):
                made += 1
                if taken[expert] == most:
                    dropped += 1
                    continue
                taken[expert] += 1
                one, its = slice(token, token + 1), slice(place, place + 1)
                rows[token] = rows[token] + forward(hidden[one], index[one, its], weights[one, its])[0]
        return torch.stack(rows)

    for module in plain.modules():
        if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts"):
            module.forward = partial(limited, module.forward, module.num_experts)
    loss = torch.zeros(())
    for ids, labels in zip(*(part.chunk(num_microbatches) for part in batch()), strict=True):
        logits = plain(ids, use_cache=False).logits.flatten(0, 1)
        loss = loss + F.cross_entropy(logits, labels.flatten(), reduction="sum") / (ROWS * SEQ_LEN)
    loss.backward()
    return plain, float(loss.detach()), dropped, made


def deviations(family: str, plans: tuple[Plan, ...], wrong: bool = False) -> list[tuple[float, float, int]]:
    """Of every plan: how far gradients and the loss are off, and by how many other choices are dropped."""
    plain, loss, dropped, _ = truth(family, plans[0].num_microbatches)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        if wrong:
            right = capacity._places
            patch.setattr(capacity, "_places", lambda *args: [1 ^ place for place in right(*args)])  # runs swapped
        for plan in plans:
            model = parallelize(tiny(family), plan, world=init_world("cpu"), capacity_factor=FACTOR)
            for _ in range(2):  # counts begin anew
                own = float(model.train_step(*batch()))
            model.evaluate(*batch())  # drops nothing
            found.append((worst_error(model, plain), abs(own - loss), int(model.dropped_choices()) - dropped))
    return found


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_one_process_is_the_rule_in_a_loop(family: str) -> None:
    ((gradient, loss, count),) = deviations(family, (plan_for(1, ALONE, ALONE, ALONE, num_microbatches=1),))
    assert gradient < 1e-5
    assert loss < 1e-5
    assert count == 0
    _, _, dropped, made = truth(family, 1)
    assert made / 6 < dropped < made / 2


@pytest.mark.parametrize(("family", "number"), [("mixtral", len(PLANS)), ("gpt_oss", 2), ("deepseek_v3", 2)])
def test_two_processes_drop_what_one_drops(pool: Pool, family: str, number: int) -> None:
    for found in pool.run(deviations, family, PLANS[:number], world_size=2):
        for gradient, loss, count in found:
            assert gradient < 1e-5
            assert loss < 1e-5
            assert count == 0


def test_runs_in_another_order_are_found(pool: Pool) -> None:
    ranks = pool.run(deviations, "mixtral", PLANS[:3], True, world_size=2)
    for of_plan in zip(*ranks, strict=True):
        assert max(gradient for gradient, _, _ in of_plan) > 1e-3
        assert all(loss > 1e-4 for _, loss, _ in of_plan)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_four_processes_drop_what_one_drops(pool: Pool, family: str) -> None:
    for found in pool.run(deviations, family, OF_FOUR, world_size=4):
        assert all(gradient < 1e-5 and loss < 1e-5 and count == 0 for gradient, loss, count in found)


def test_a_run_says_how_many_were_dropped(tmp_path: Path) -> None:
    plan = plan_for(1, ALONE, ALONE, ALONE, num_microbatches=1)
    model = parallelize(tiny("mixtral"), plan, world=init_world("cpu"), capacity_factor=FACTOR)
    dataset = Dataset(
        StreamRows(np.random.RandomState(0).randint(0, 97, size=2000), SEQ_LEN), global_batch_size=ROWS, fingerprint="x"
    )
    section = TrainSection(global_batch_size=ROWS, seq_len=SEQ_LEN, num_steps=2, lr=1e-3)
    with pytest.raises(ConfigError, match=r"says capacity_factor=None but the model was made with 0\.8"):
        train(model, section, dataset, plan=plan, run_dir=tmp_path)
    limited = section.model_copy(update={"capacity_factor": FACTOR})
    train(model, limited, dataset, plan=plan, run_dir=tmp_path)
    steps = [row["dropped_choices"] for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert steps[-1] == int(model.dropped_choices())
    assert all(0 < dropped < 2 * ROWS * SEQ_LEN * 2 for dropped in steps)


def test_a_capacity_that_cannot_be_kept_is_refused() -> None:
    plan = plan_for(1, ALONE, *[ALONE] * 4)
    with pytest.raises(ConfigError, match=r"limits experts and .* has none; leave capacity_factor out"):
        parallelize(tiny_model("llama"), plan, world=init_world("cpu"), capacity_factor=1.25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capacity, "experts_in", lambda *_: None)  # as in LongCat-Flash, which takes seconds to recognise
        with pytest.raises(ConfigError, match="asked in a way of their own; leave capacity_factor out"):
            parallelize(tiny_model("mixtral"), plan, world=init_world("cpu"), capacity_factor=1.25)
    with pytest.raises(ConfigError, match="must be a finite number above 0, got -1"):
        parallelize(tiny_model("mixtral"), plan, world=init_world("cpu"), capacity_factor=-1.0)
    model = parallelize(tiny_model("mixtral"), plan, world=init_world("cpu"))
    with pytest.raises(ConfigError, match="without a capacity drop nothing"):
        model.dropped_choices()
