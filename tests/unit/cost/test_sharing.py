"""Pipelines whose ranks share cores, against timelines worked out by hand."""

from __future__ import annotations

import pytest

from galvatron.cost import predict
from galvatron.cost.pipeline import Event, Pipeline, timeline
from galvatron.cost.sharing import shared_timeline
from galvatron.plan import LayerStrategy, Plan
from unit.profiles import make_hardware, make_model, make_spec


def times(events: tuple[Event, ...], stage: int) -> list[tuple[str, int, float, float]]:
    return [(e.kind[0], e.microbatch, e.start_s, e.end_s) for e in events if e.stage == stage]


def test_one_core_for_two_stages_does_all_their_work_one_after_another() -> None:
    events = shared_timeline(Pipeline("gpipe", 2, 2, [2, 2], [4, 4]), 0.5)
    # f0 alone at double speed; f1 beside the other stage's f0; f1 of stage 1 alone; b0 alone; both; b1 alone
    assert times(events, 0) == [("f", 0, 0, 1), ("f", 1, 1, 3), ("b", 0, 6, 10), ("b", 1, 10, 12)]
    assert times(events, 1) == [("f", 0, 1, 3), ("f", 1, 3, 4), ("b", 0, 4, 6), ("b", 1, 6, 10)]
    assert events[-1].end_s <= 12 == (8 + 16) / 2  # no core ever idles


def test_a_rank_uses_no_more_than_its_full_speed() -> None:
    events = shared_timeline(Pipeline("1f1b", 4, 1, [4] * 4, [4] * 4, transfer_s=[1.0] * 4), 0.5)
    # one stage of four at work: twice as fast as with all four, not four times; receiving costs half a second
    assert max(event.end_s for event in events) == pytest.approx(8 * 2 + 6 * 0.5)


@pytest.mark.parametrize("m", [1, 3, 8])
def test_full_speed_for_all_is_the_ordinary_timeline(m: int) -> None:
    pipeline = Pipeline("1f1b", 3, m, [1.0, 3.0, 2.0], [2.0, 5.0, 1.0])
    assert shared_timeline(pipeline, 1.0) == timeline(pipeline)


def test_sharing_makes_a_pipeline_cheaper_and_its_parts_still_sum_to_the_step() -> None:
    one = LayerStrategy()
    plan = Plan(
        model="toy",
        world_size=4,
        layers_per_stage=(1, 1, 1, 1),
        num_microbatches=2,
        global_batch_size=8,
        seq_len=64,
        embedding=one,
        layers=(one,) * 4,
        head=one,
    )
    hardware, model = make_hardware(4), make_model(make_spec())
    shared = hardware.model_copy(update={"device": hardware.device.model_copy(update={"full_speed_fraction": 0.5})})
    apart, together = predict(plan, model, hardware), predict(plan, model, shared)
    assert apart.step_time_s / 2 <= together.step_time_s < apart.step_time_s
    for prediction in (apart, together):
        assert sum(prediction.parts_s.values()) == pytest.approx(prediction.step_time_s)
