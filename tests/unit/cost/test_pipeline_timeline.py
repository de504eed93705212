"""The replayed timeline equals timelines worked out by hand."""

from __future__ import annotations

import itertools
import random

import pytest

from galvatron.cost.pipeline import Event, Pipeline, timeline
from galvatron.plan.plan import Schedule
from galvatron.plan.schedules import on_their_way


def times(events: tuple[Event, ...], stage: int) -> list[tuple[str, int, float, float]]:
    return [(e.kind[0], e.microbatch, e.start_s, e.end_s) for e in events if e.stage == stage]


def test_gpipe_with_two_even_stages() -> None:
    events = timeline(Pipeline("gpipe", 2, 2, [1, 1], [2, 2]))
    assert times(events, 0) == [("f", 0, 0, 1), ("f", 1, 1, 2), ("b", 0, 5, 7), ("b", 1, 7, 9)]
    assert times(events, 1) == [("f", 0, 1, 2), ("f", 1, 2, 3), ("b", 0, 3, 5), ("b", 1, 5, 7)]


def test_1f1b_with_two_uneven_stages() -> None:
    events = timeline(Pipeline("1f1b", 2, 3, [1, 2], [1, 4]))
    assert times(events, 1) == [
        ("f", 0, 1, 3),
        ("b", 0, 3, 7),
        ("f", 1, 7, 9),
        ("b", 1, 9, 13),
        ("f", 2, 13, 15),
        ("b", 2, 15, 19),
    ]
    assert times(events, 0) == [
        ("f", 0, 0, 1),
        ("f", 1, 1, 2),
        ("b", 0, 7, 8),
        ("f", 2, 8, 9),
        ("b", 1, 13, 14),
        ("b", 2, 19, 20),
    ]


def test_a_transfer_delays_the_receiver_and_blocks_it_where_nothing_overlaps() -> None:
    pipeline = Pipeline("gpipe", 2, 2, [1, 1], [1, 1], transfer_s=[0, 0.5])
    free = timeline(pipeline)
    assert times(free, 1) == [("f", 0, 1.5, 2.5), ("f", 1, 2.5, 3.5), ("b", 0, 3.5, 4.5), ("b", 1, 4.5, 5.5)]
    assert times(free, 0)[2:] == [("b", 0, 5.0, 6.0), ("b", 1, 6.0, 7.0)]
    blocked = timeline(pipeline, receiving_blocks=True)
    assert times(blocked, 1)[:2] == [("f", 0, 1.5, 2.5), ("f", 1, 3.0, 4.0)]


def test_a_stage_may_begin_later_and_the_last_microbatch_take_longer() -> None:
    events = timeline(Pipeline("1f1b", 1, 3, [1], [2], ready_s=[2], last_s=[3]))
    assert times(events, 0)[0] == ("f", 0, 2, 3)
    assert events[-1].end_s == 3 + 1 + 1 + 2 + 2 + 5


def test_interleaved_with_two_stages_of_two_chunks() -> None:
    events = timeline(Pipeline("interleaved", 2, 2, [1, 1, 1, 1], [2, 2, 2, 2]))
    # both microbatches through chunk 0, then chunk 1; back in the opposite order
    assert times(events, 0) == [
        ("f", 0, 0, 1),
        ("f", 1, 1, 2),
        ("f", 0, 2, 3),
        ("f", 1, 3, 4),
        ("b", 0, 6, 8),
        ("b", 1, 9, 11),
        ("b", 0, 11, 13),
        ("b", 1, 13, 15),
    ]
    assert [e.chunk for e in events if e.stage == 0] == [0, 0, 1, 1, 1, 1, 0, 0]
    assert times(events, 1) == [
        ("f", 0, 1, 2),
        ("f", 1, 2, 3),
        ("f", 0, 3, 4),
        ("b", 0, 4, 6),
        ("f", 1, 6, 7),
        ("b", 1, 7, 9),
        ("b", 0, 9, 11),
        ("b", 1, 11, 13),
    ]
    assert max(e.end_s for e in events) == 2 * 6 + (2 - 1) * 6 / 2  # m·w + (pp - 1)·w / v


def test_zero_bubble_puts_weight_gradients_where_1f1b_waits() -> None:
    events = timeline(Pipeline("zero_bubble", 2, 2, [1, 1], [1, 1], [1, 1]))
    assert times(events, 0) == [
        ("f", 0, 0, 1),
        ("f", 1, 1, 2),
        ("b", 0, 3, 4),
        ("w", 0, 4, 5),
        ("b", 1, 5, 6),
        ("w", 1, 6, 7),
    ]
    assert times(events, 1) == [
        ("f", 0, 1, 2),
        ("b", 0, 2, 3),
        ("f", 1, 3, 4),
        ("b", 1, 4, 5),
        ("w", 0, 5, 6),
        ("w", 1, 6, 7),
    ]


@pytest.mark.parametrize("passes", [(1, 1, 1), (1, 1.5, 1.5), (1, 2, 1), (2, 1, 1)])
@pytest.mark.parametrize("m", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("pp", [2, 4])
def test_a_zero_bubble_step_is_m_microbatches_and_what_weight_passes_cannot_fill(
    pp: int, m: int, passes: tuple[float, float, float]
) -> None:
    forward, backward, weight = passes
    events = timeline(Pipeline("zero_bubble", pp, m, [forward] * pp, [backward] * pp, [weight] * pp))
    hidden = min(1, (m - 1) / (pp - 1)) * min(forward, weight)
    bubble = (pp - 1) * (forward + backward - hidden)
    assert max(event.end_s for event in events) == pytest.approx(m * sum(passes) + bubble)


@pytest.mark.parametrize("passes", [(1, 1, 1), (1, 1.2, 1.1), (1, 2, 1)])
@pytest.mark.parametrize("chunks", [2, 3, 6])
@pytest.mark.parametrize(("pp", "m"), [(2, 4), (4, 8), (4, 16), (8, 16)])
def test_chunks_divide_the_bubble_that_weight_passes_leave(
    pp: int, m: int, chunks: int, passes: tuple[float, float, float]
) -> None:
    forward, backward, weight = passes
    columns = ([seconds] * pp * chunks for seconds in passes)
    end = max(event.end_s for event in timeline(Pipeline("zero_bubble", pp, m, *columns)))
    bubble = (pp - 1) * (forward + backward - min(forward, weight))
    whole = m * chunks * sum(passes)
    if weight <= forward:
        assert end == pytest.approx(whole + bubble)
    else:
        assert whole + 0.9 * bubble < end <= whole + bubble


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize(("pp", "m"), [(2, 4), (4, 8), (4, 4)])
def test_interleaving_divides_the_bubble_by_its_chunks(pp: int, m: int, chunks: int) -> None:
    entries = pp * chunks
    end = max(e.end_s for e in timeline(Pipeline("interleaved", pp, m, [1.0] * entries, [2.0] * entries)))
    assert end == pytest.approx(3 * chunks * m + 3 * (pp - 1))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("m", [1, 2, 3, 8])
def test_equal_stages_take_m_plus_pp_minus_one_microbatches(schedule: Schedule, m: int) -> None:
    for pp in (1, 2, 4):
        events = timeline(Pipeline(schedule, pp, m, [1.0] * pp, [2.0] * pp))
        assert max(event.end_s for event in events) == pytest.approx((m + pp - 1) * 3.0)
        assert len(events) == pp * 2 * m


def test_1f1b_never_takes_longer_than_the_additive_form() -> None:
    shake = random.Random(0)
    for _ in range(60):
        pp, m = shake.choice([2, 3, 5]), shake.choice([1, 2, 7, 12])
        forward = [shake.uniform(0.2, 1) for _ in range(pp)]
        backward = [shake.uniform(0.2, 2) for _ in range(pp)]
        works = [f + b for f, b in zip(forward, backward, strict=True)]
        end = max(e.end_s for e in timeline(Pipeline("1f1b", pp, m, forward, backward)))
        assert max(m * w for w in works) <= end <= (sum(works) + (m - 1) * max(works)) * (1 + 1e-9)


def test_stages_work_on_one_thing_at_a_time_and_after_their_input() -> None:
    events = timeline(Pipeline("1f1b", 3, 5, [1.0, 0.3, 2.0], [0.7, 2.0, 1.0], transfer_s=[0, 0.1, 0.1]))
    ends = {(e.stage, e.kind, e.microbatch): e.end_s for e in events}
    for stage in range(3):
        own = [e for e in events if e.stage == stage]
        assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(own))
        for e in own:
            source = (stage - 1 if e.kind == "forward" else stage + 1, e.kind, e.microbatch)
            assert e.start_s >= ends.get(source, -0.1) + 0.1 - 1e-12


@pytest.mark.parametrize("schedule", ["interleaved", "zero_bubble"])
@pytest.mark.parametrize(("pp", "chunks"), [(2, 2), (2, 6), (4, 2), (4, 3), (8, 2), (8, 5), (16, 2), (16, 6), (32, 3)])
@pytest.mark.parametrize("input_s", [0.8, 1.0, 1.2])
def test_no_stage_waits_for_a_gradient_to_be_taken(schedule: Schedule, pp: int, chunks: int, input_s: float) -> None:
    entries, splits = pp * chunks, schedule == "zero_bubble"
    weights = [2 - input_s] * entries if splits else []
    backward = [input_s if splits else 2.0] * entries
    events = timeline(Pipeline(schedule, pp, 4 * pp, [1.0] * entries, backward, weights))
    backwards = {(e.microbatch, e.chunk * pp + e.stage): e for e in events if e.kind == "backward"}
    changes: dict[int, list[tuple[float, int]]] = {stage: [] for stage in range(pp)}
    for (microbatch, entry), sender in backwards.items():
        if entry > 0:
            taken_s = backwards[microbatch, entry - 1].start_s
            changes[entry % pp] += [(round(sender.end_s, 6), 1), (round(taken_s, 6), -1)]
    most = [max(itertools.accumulate(n for _, n in sorted(of_stage))) for of_stage in changes.values()]
    assert max(most) <= on_their_way(pp, chunks) * (chunks - 1)
