"""Chunks divided anew: the same stages, no change of the objective, and faster where one of them has a heavy head."""

from __future__ import annotations

import pytest

from galvatron.core.model_profile import ModelProfile
from galvatron.cost import Setting, objective_s, replay
from galvatron.plan.plan import LayerStrategy, Plan
from galvatron.search import Limits, search
from galvatron.search.twins import in_even_chunks, stage_layers, twins
from unit.profiles import make_hardware, make_model, make_spec

HARDWARE = make_hardware(4)


def model_with_head(layers: int, work: float) -> ModelProfile:
    """Layers and a head that takes ``work`` of them."""
    model = make_model(make_spec(layers), flops_per_s=1e9)
    layer = {(s.tp, s.batch): s for s in model.compute if s.unit not in ("embedding", "head")}
    compute = [
        s.model_copy(
            update={
                "forward_s": work * layer[s.tp, s.batch].forward_s,
                "backward_s": work * layer[s.tp, s.batch].backward_s,
            }
        )
        if s.unit == "head"
        else s
        for s in model.compute
    ]
    return model.model_copy(update={"compute": tuple(compute)})


def interleaved(sizes: list[int], m: int = 4) -> Plan:
    """Of four stages, one device each; every layer of a stage keeps as much as its stage says."""
    levels = ("none", "selective", "full", "none")
    strategies = [LayerStrategy(recompute=levels[entry % 4]) for entry, size in enumerate(sizes) for _ in range(size)]
    plain = LayerStrategy()
    return Plan(
        model="made-up",
        world_size=4,
        layers_per_stage=tuple(sizes),
        schedule="interleaved",
        model_chunks=len(sizes) // 4,
        num_microbatches=m,
        global_batch_size=m,
        seq_len=64,
        precision="fp32",
        grad_reduce_dtype="fp32",
        embedding=plain,
        layers=tuple(strategies),
        head=plain,
    )


@pytest.mark.parametrize(
    ("sizes", "evened"),
    [
        ([3, 4, 4, 3, 3, 3, 3, 3, 3, 3, 3, 2, 3, 3, 3, 2], [3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 1]),
        ([2, 3, 3, 2, 2, 2, 2, 1], [2, 2, 2, 2, 2, 3, 3, 1]),
        ([2, 2, 2, 1, 1, 2, 2, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 2, 3, 3, 1]),
        ([2, 2, 2, 2, 1, 1, 1, 1], [2, 2, 2, 2, 1, 1, 1, 1]),
    ],
)
def test_stages_differ_in_their_last_chunk_alone(sizes: list[int], evened: list[int]) -> None:
    plan = interleaved(sizes)
    other = in_even_chunks(plan)
    assert list(other.layers_per_stage) == evened
    assert stage_layers(other) == stage_layers(plan)
    assert other.model_copy(update={"layers_per_stage": plan.layers_per_stage, "layers": plan.layers}) == plan


def test_every_twin_has_another_schedule_or_other_chunks() -> None:
    plan, spec = interleaved([2, 3, 3, 2, 2, 2, 2, 1]), make_spec(17)
    found = [(twin.schedule, twin.layers_per_stage == plan.layers_per_stage) for twin in twins(plan, spec)]
    assert found == [("interleaved", False), ("zero_bubble", True), ("zero_bubble", False)]
    evened = in_even_chunks(plan)
    assert [twin.schedule for twin in twins(evened, spec)] == ["zero_bubble"]
    of_two_kinds = spec.model_copy(update={"layers": (*spec.layers, spec.layers[0])})
    assert [twin.schedule for twin in twins(plan, of_two_kinds)] == ["zero_bubble"]


def test_a_stage_with_a_head_waits_in_shorter_chunks_before_it() -> None:
    """Four microbatches on four stages pass a chunk at the pace of its slowest stage."""
    model = model_with_head(12, 1.0)
    plan = interleaved([2, 2, 2, 1, 1, 1, 1, 2])
    even = in_even_chunks(plan)
    assert even.layers_per_stage == (2, 2, 2, 2, 1, 1, 1, 1)
    setting = Setting.of(plan, model, HARDWARE)
    assert objective_s(even, setting) == pytest.approx(objective_s(plan, setting))
    assert replay(even, model, HARDWARE).step_time_s < 0.9 * replay(plan, model, HARDWARE).step_time_s


def test_the_search_divides_chunks_anew_where_the_head_is_heavy() -> None:
    model = model_with_head(48, 3.0)
    limits = Limits(fix={"pp": 4, "num_microbatches": 4, "model_chunks": 4, "schedule": "interleaved"})
    found = search(model, HARDWARE, global_batch_size=8, memory_limit_bytes=2**36, limits=limits, baselines=False)
    sizes = found.plan.layers_per_stage
    assert all(len(set(sizes[chunk * 4 : chunk * 4 + 4])) == 1 for chunk in range(3))
    assert sizes[-1] < min(sizes[-4:-1])
