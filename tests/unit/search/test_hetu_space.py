"""Every plan of ``--space hetu`` is one that Hetu-Galvatron's file can say, and the best of those."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from galvatron.core.errors import ConfigError
from galvatron.core.model import RECOMPUTES
from galvatron.cost import Setting, predict, replay, unit_memory
from galvatron.cost.step import objective_s
from galvatron.estimate import ClusterShape, estimate_model, model_spec
from galvatron.exchange import export_plan, import_plan
from galvatron.plan import LayerStrategy
from galvatron.search import Limits, SearchResult, search
from unit.profiles import make_hardware, make_model, make_spec
from unit.search.enumerate_plans import Choice, every_task, plans_of

HETU = Limits("hetu")


def all_plans(found: SearchResult) -> list[object]:
    rivals = [plan for plan in (*found.baselines.values(), found.unlimited) if plan is not None]
    return [found.plan, *found.candidates, *rivals, *(short.plan for short in found.shortfalls.values())]


@pytest.mark.parametrize(
    ("card", "cluster", "batch"),
    [
        ("llama2-7b", "a100:1x8", 16),
        ("qwen2.5-7b", "a100:2x8", 32),
        ("vit-h", "rtx4090:1x8", 16),
        ("t5-3b", "a100:1x4", 8),
    ],
)
def test_every_plan_goes_to_its_file_and_back(card: str, cluster: str, batch: int) -> None:
    shape, spec = ClusterShape.parse(cluster, ()), model_spec(card)
    model = estimate_model(spec, shape.preset, seq_len=min(spec.max_seq_len, 1024))
    found = search(model, shape.profile(), global_batch_size=batch, limits=HETU)
    for plan in all_plans(found):
        back = import_plan(export_plan(plan), plan.world_size, plan.seq_len, spec, plan.precision)
        assert (back.layers, back.embedding, back.schedule) == (plan.layers, plan.embedding, plan.schedule)


@pytest.mark.parametrize("seed", range(6))
def test_the_search_equals_brute_force(seed: int) -> None:
    spec = make_spec(2, vocab=[30, 250, 1000][seed % 3], tied=seed % 2 == 0)
    model = make_model(spec, tps=(1, 2, 4), seed=seed, flops_per_s=10 ** (9 + seed / 3), optimizer_s_per_parameter=1e-8)
    hardware = make_hardware(4, latency_s=1e-5, seed=seed, memory_bytes=2**40)
    degrees = (1, 2, 4)
    named = {"tp": degrees, "ulysses": degrees, "cp": (1,), "ep": (1,), "dp_shard": degrees, "offload": ("none",)}
    choice = Choice({**named, "zero": (0, 2, 3), "recompute": ("none", "full")}, (("1f1b", 1),), "hetu")
    settings = list(every_task(model, hardware, 4, choice))
    objectives, peaks = (
        np.concatenate(column) for column in zip(*(p for s in settings for p in plans_of(s, choice)), strict=True)
    )
    for part in (0.02, 0.2, 1.0):
        limit = int(np.quantile(peaks, part))
        found = search(model, hardware, global_batch_size=4, memory_limit_bytes=limit, limits=HETU, baselines=False)
        assert found.plan.prediction is not None
        assert found.plan.prediction.proof is not None
        optimum = float(objectives[peaks <= limit].min())
        assert found.plan.prediction.proof.objective_s == pytest.approx(optimum, rel=1e-9)
        assert found.plan.prediction.proof.gap == pytest.approx(0.0, abs=1e-9)
        assert found.plan.prediction.peak_memory_bytes <= limit
        export_plan(found.plan)


def test_whole_gradients_wait_for_the_last_microbatch_in_its_memory() -> None:
    model, hardware = make_model(make_spec(2)), make_hardware(4)
    own = Setting(model, hardware, 1, 4, 16, model.seq_len, "fp32", "fp32")
    parameters = model.spec.layer.num_parameters
    for strategy in (LayerStrategy(dp_shard=4, zero=2), LayerStrategy(dp_shard=4, zero=3)):
        theirs, ours = (unit_memory(s, "layer", strategy) for s in (replace(own, runtime="hetu"), own))
        assert theirs.unsharded_bytes - ours.unsharded_bytes == 4 * parameters - theirs.gradient_bytes
        alone = replace(own, num_microbatches=1)
        theirs, ours = (unit_memory(s, "layer", strategy) for s in (replace(alone, runtime="hetu"), alone))
        assert theirs.resident_bytes == ours.resident_bytes


def test_what_is_predicted_is_what_was_searched() -> None:
    model, hardware = make_model(make_spec(4, tied=True)), make_hardware(4)
    found = search(model, hardware, global_batch_size=8, limits=replace(HETU, fix={"pp": 2}), baselines=False)
    proof, plan = found.prediction.proof, found.plan
    assert proof is not None
    again = predict(plan, model, hardware, found.memory_limit_bytes, "hetu")
    assert found.prediction.model_copy(update={"proof": None}) == again
    assert replay(plan, model, hardware, "hetu").step_time_s == again.step_time_s
    best = min(objective_s(p, Setting.of(p, model, hardware, "hetu")) for p in (plan, *found.candidates))
    assert best == pytest.approx(proof.objective_s)


def test_its_schedules_alone_can_be_fixed() -> None:
    model = make_model(make_spec(4))
    with pytest.raises(ConfigError, match="schedule=zero_bubble needs --space all: space=hetu is what plans of Hetu"):
        search(model, make_hardware(4), global_batch_size=8, limits=replace(HETU, fix={"schedule": "zero_bubble"}))
    assert set(RECOMPUTES) > {"none", "full"}
