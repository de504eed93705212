"""Interleaved layers may change layout wherever they like: search equals brute force over all such plans."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from galvatron.core.hardware import HardwareProfile
from galvatron.core.model_profile import ModelProfile
from galvatron.plan import Plan
from galvatron.search import Limits, borders, search
from unit.profiles import make_hardware, make_model, make_spec
from unit.search.enumerate_plans import Choice, every_task, plans_of, size_of
from unit.search.test_brute_force import choice_of, limits_of, room_of

SHAPES = [(4, 4, 0, 4), (4, 4, 0, 8), (8, 4, 0, 8), (4, 5, 0, 4), (4, 2, 2, 8), (4, 6, 0, 4)]
SWITCHED = ("ulysses", "cp", "zero", "dp_shard", "full")
SCHEDULES = [("interleaved", 2)]
MOST = 60_000
INSTANCES, FEW = 120, (0, 3, 4, 11, 14, 16)  # of each shape some, where the best has several layouts


def instance(seed: int) -> tuple[ModelProfile, HardwareProfile, int, Choice, Limits, random.Random]:
    """A small model on two stages of several devices each, in two chunks."""
    shake = random.Random(seed)
    world, layers, others, batch = SHAPES[seed % len(SHAPES)]
    spec = make_spec(layers, vocab=shake.choice([30, 250, 1000]), tied=shake.random() < 0.4, others=others)
    rate, optimizer = 10 ** shake.uniform(9, 11), 10 ** shake.uniform(-9, -7)
    model = make_model(spec, tps=(1, 2, 4), seed=seed, flops_per_s=rate, optimizer_s_per_parameter=optimizer)
    device, latency_s = shake.choice(["cpu", "cuda"]), 10 ** shake.uniform(-6, -3)
    hardware = make_hardware(world, device, latency_s=latency_s, seed=seed, memory_bytes=2**40)
    on = ["tp", *shake.sample(SWITCHED, shake.choice([1, 2, 3]))]
    while size_of(model, hardware, (batch,), choice_of(on, SCHEDULES)) > MOST:
        on = on[:-1]
    limits = limits_of(on, SCHEDULES)
    limits = Limits("all", fix={"pp": 2}, forbid=limits.forbid, at_most=limits.at_most)
    return model, hardware, batch, choice_of(on, SCHEDULES), limits, shake


@pytest.mark.parametrize("most", [borders.MOST, 1], ids=["exact", "bounded"])
@pytest.mark.parametrize(
    "seed", [pytest.param(s, marks=[] if s in FEW else [pytest.mark.slow]) for s in range(INSTANCES)]
)
def test_the_search_equals_brute_force(seed: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """``most`` 1: where there are too many borders, the bound is still below, and the plan above, the best."""
    monkeypatch.setattr("galvatron.search.tables.MOST", most)
    model, hardware, batch, choice, limits, shake = instance(seed)
    tasks = [setting for setting in every_task(model, hardware, batch, choice) if setting.pp == 2]
    found = [plans for setting in tasks for plans in plans_of(setting, choice)]
    objectives, peaks = (np.concatenate(columns) for columns in zip(*found, strict=True))
    ordered, mixed = np.unique(peaks), 0
    for _ in range(4):
        tensors = int(ordered[int(shake.random() ** 2 * (len(ordered) - 1))])
        limit = tensors if hardware.device.type == "cpu" else int(tensors * 1.03) + 2 + 2**30
        optimum = float(objectives[peaks <= room_of(limit, hardware.device.type)].min())
        arguments: dict[str, Any] = {"global_batch_size": batch, "memory_limit_bytes": limit, "limits": limits}
        result = search(model, hardware, baselines=False, **arguments)
        proof = result.prediction.proof
        assert proof is not None
        assert proof.lower_bound_s <= optimum * (1 + 1e-9)
        assert proof.objective_s >= optimum * (1 - 1e-9)
        assert result.prediction.peak_memory_bytes <= limit
        if most > 1:
            assert proof.objective_s == pytest.approx(optimum, rel=1e-9)
            assert proof.gap == pytest.approx(0.0, abs=1e-9)
            mixed += mixes(result.plan)
    assert mixed or most == 1 or seed not in FEW


def mixes(plan: Plan) -> bool:
    return len({strategy.sequence_degree for strategy in plan.layers}) > 1
