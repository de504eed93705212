"""The plan that a job goes on under after the best one."""

from __future__ import annotations

import pytest

from galvatron.search import Limits, SearchResult, search
from galvatron.search.second import second_plan
from unit.profiles import make_hardware, make_model, make_spec


def differs(result: SearchResult, devices: int, layers: int) -> bool:
    other = second_plan(result, make_model(make_spec(layers)), make_hardware(devices))
    assert other is not None
    assert other.prediction is not None
    assert other.prediction.peak_memory_bytes <= result.memory_limit_bytes
    other.validate(make_spec(layers), devices)
    return (other.layers_per_stage, other.layers) != (result.plan.layers_per_stage, result.plan.layers)


def test_it_differs_in_more_than_microbatches() -> None:
    result = search(make_model(make_spec(4)), make_hardware(4), global_batch_size=8)
    assert differs(result, 4, 4)


@pytest.mark.parametrize(("devices", "layers"), [(1, 1), (1, 4), (2, 1)])
def test_a_tiny_model_whose_search_knows_one_plan_has_one_too(devices: int, layers: int) -> None:
    limits = Limits(fix={"pp": 1, "num_microbatches": 1}, at_most={"tp": 1})
    result = search(make_model(make_spec(layers)), make_hardware(devices), global_batch_size=2, limits=limits)
    assert {plan.layers for plan in result.candidates} <= {result.plan.layers}
    assert differs(result, devices, layers)
