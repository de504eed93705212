"""A whole plan's prediction: parts that sum, steps worked out by hand, memory that follows the schedule."""

from __future__ import annotations

import random
from typing import Any

import pytest

from galvatron.core.errors import PlanError
from galvatron.cost import Setting, predict, replay, unit_memory, unit_times
from galvatron.cost.communication import redistribution_s, transfer_s
from galvatron.cost.step import objective_s
from galvatron.plan.plan import LayerStrategy, Plan
from unit.profiles import make_hardware, make_model, make_spec

MODEL, HARDWARE = make_model(), make_hardware()


def plan_of(layers: list[LayerStrategy], per_stage: tuple[int, ...] = (4,), **fields: Any) -> Plan:
    defaults: dict[str, Any] = {"global_batch_size": 16, "num_microbatches": 4, "embedding": layers[0]}
    return Plan.model_validate(
        {
            "model": "toy",
            "world_size": 4,
            "layers_per_stage": per_stage,
            "seq_len": 64,
            "layers": tuple(layers),
            "head": layers[-1],
            **defaults,
            **fields,
        }
    )


def test_one_stage_is_m_microbatches_and_what_comes_once() -> None:
    data, tensor = LayerStrategy(dp_shard=4, zero=2), LayerStrategy(tp=4)
    plan = plan_of([data, data, tensor, tensor])
    setting = Setting.of(plan, MODEL, HARDWARE)
    units = [("embedding", data), ("layer", data), ("layer", data), ("layer", tensor), ("layer", tensor)]
    times = [unit_times(setting, unit, strategy) for unit, strategy in [*units, ("head", tensor)]]  # type: ignore[arg-type]
    every = sum(t.forward_s + t.backward_s for t in times) + 2 * redistribution_s(setting, "layer", 1, 4)
    once = sum(t.first_s + t.last_s + t.delayed_s + t.replicated_s + t.optimizer_s for t in times)
    latency = setting.link("all_reduce", 4, 1).latency_s
    assert predict(plan, MODEL, HARDWARE).step_time_s == pytest.approx(4 * every + once + latency)
    assert objective_s(plan, setting) == pytest.approx(4 * every + once)


def test_two_uneven_stages_by_hand() -> None:
    # GPipe, two microbatches, no sharding: all that happens is forwards, backwards, transfers and the optimizer
    alone = LayerStrategy()
    hardware = make_hardware(2)
    plan = plan_of([alone] * 4, (3, 1), world_size=2, num_microbatches=2, schedule="gpipe")
    setting = Setting.of(plan, MODEL, hardware)
    replayed = replay(plan, MODEL, hardware)
    (f0, b0), (f1, b1) = ((s.forward_s, s.backward_s) for s in replayed.stages)
    move = transfer_s(setting, "layer")
    assert f0 > f1 + move  # so the second stage waits for every microbatch
    assert b0 > b1 + move
    optimizer = max(sum(t.optimizer_s for t in stage.times) for stage in replayed.stages)
    assert replayed.step_time_s == pytest.approx(2 * f0 + move + f1 + b1 + move + b0 + (move + b0) + optimizer)


def test_parts_sum_to_the_step() -> None:
    shake = random.Random(1)
    choices = [
        LayerStrategy(dp_replicate=2),
        LayerStrategy(dp_shard=2, zero=3, recompute="full"),
        LayerStrategy(dp_shard=2, zero=1),
        LayerStrategy(tp=2, recompute="full"),
    ]
    ends = LayerStrategy(tp=2)
    for device in ("cpu", "cuda"):
        for schedule in ("gpipe", "1f1b"):
            layers = [shake.choice(choices) for _ in range(4)]
            plan = plan_of(layers, (1, 3), schedule=schedule, embedding=ends, head=ends)
            prediction = predict(plan, MODEL, make_hardware(4, device))
            assert sum(prediction.parts_s.values()) == pytest.approx(prediction.step_time_s)
            assert all(seconds >= 0 for seconds in prediction.parts_s.values())
            assert prediction.parts_s["pipeline_bubble"] > 0


def test_memory_is_what_stays_plus_microbatches_in_flight_plus_the_largest_transient() -> None:
    strategy = LayerStrategy(dp_shard=2, zero=3)
    held = {}
    for schedule in ("gpipe", "1f1b"):
        plan = plan_of([strategy] * 4, (2, 2), schedule=schedule)
        setting = Setting.of(plan, MODEL, HARDWARE)
        first, last = predict(plan, MODEL, HARDWARE, 10**9).stages
        units = [unit_memory(setting, "embedding", strategy), *[unit_memory(setting, "layer", strategy)] * 2]
        in_flight = plan.microbatches_in_flight(0)
        own = sum(unit.activation_bytes for unit in units) + setting.entering_bytes("layer")
        assert first.activation_bytes == in_flight * own
        assert first.peak_memory_bytes == sum(unit.resident_bytes for unit in units) + in_flight * own + max(
            unit.transient_bytes for unit in units
        )
        assert first.low_memory_bytes <= first.peak_memory_bytes
        assert first.parameter_bytes == sum(unit.parameter_bytes for unit in units)
        held[schedule] = (first.activation_bytes, last.activation_bytes)
    assert held["gpipe"][0] == 2 * held["1f1b"][0]  # 4 in flight against 2
    assert held["gpipe"][1] == 4 * held["1f1b"][1]  # 4 in flight against 1


def test_faster_links_are_never_slower() -> None:
    layers = [LayerStrategy(tp=2), LayerStrategy(dp_shard=2, zero=3), LayerStrategy(dp_shard=2, zero=1)]
    plan = plan_of([*layers, layers[1]], (1, 3), embedding=layers[0], head=layers[1])
    for device in ("cpu", "cuda"):
        steps = [
            predict(plan, MODEL, make_hardware(4, device, bytes_per_s=rate)).step_time_s for rate in (1e8, 1e9, 1e10)
        ]
        assert steps == sorted(steps, reverse=True)


def test_a_plan_for_another_world_is_refused() -> None:
    with pytest.raises(PlanError, match="world_size=4 but 8"):
        predict(plan_of([LayerStrategy(tp=4)] * 4), MODEL, make_hardware(8))


def test_a_tied_model_waits_for_both_copies() -> None:
    tied = make_model(make_spec(tied=True))
    plan = plan_of([LayerStrategy(tp=2)] * 4, (2, 2))
    untied_s, tied_s = (predict(plan, model, HARDWARE).step_time_s for model in (MODEL, tied))
    assert tied_s > untied_s
