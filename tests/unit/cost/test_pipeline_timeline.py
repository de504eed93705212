"""The replayed timeline equals timelines worked out by hand."""

from __future__ import annotations

import itertools
import random

import pytest

from galvatron.cost.pipeline import Event, timeline
from galvatron.plan.plan import Schedule


def times(events: tuple[Event, ...], stage: int) -> list[tuple[str, int, float, float]]:
    return [(e.kind[0], e.microbatch, e.start_s, e.end_s) for e in events if e.stage == stage]


def constant(seconds: list[float], m: int) -> list[list[float]]:
    return [[s] * m for s in seconds]


def test_gpipe_with_two_even_stages() -> None:
    events = timeline("gpipe", constant([1, 1], 2), constant([2, 2], 2))
    assert times(events, 0) == [("f", 0, 0, 1), ("f", 1, 1, 2), ("b", 0, 5, 7), ("b", 1, 7, 9)]
    assert times(events, 1) == [("f", 0, 1, 2), ("f", 1, 2, 3), ("b", 0, 3, 5), ("b", 1, 5, 7)]


def test_1f1b_with_two_uneven_stages() -> None:
    events = timeline("1f1b", constant([1, 2], 3), constant([1, 4], 3))
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
    forward, backward = constant([1, 1], 2), constant([1, 1], 2)
    free = timeline("gpipe", forward, backward, 0.5)
    assert times(free, 1) == [("f", 0, 1.5, 2.5), ("f", 1, 2.5, 3.5), ("b", 0, 3.5, 4.5), ("b", 1, 4.5, 5.5)]
    assert times(free, 0)[2:] == [("b", 0, 5.0, 6.0), ("b", 1, 6.0, 7.0)]
    blocked = timeline("gpipe", forward, backward, 0.5, receiving_blocks=True)
    assert times(blocked, 1)[:2] == [("f", 0, 1.5, 2.5), ("f", 1, 3.0, 4.0)]


def test_the_first_and_last_microbatch_may_take_longer() -> None:
    events = timeline("1f1b", [[3, 1, 1]], [[2, 2, 5]])
    assert times(events, 0)[0] == ("f", 0, 0, 3)
    assert events[-1].end_s == 3 + 1 + 1 + 2 + 2 + 5


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("m", [1, 2, 3, 8])
def test_equal_stages_take_m_plus_pp_minus_one_microbatches(schedule: Schedule, m: int) -> None:
    for pp in (1, 2, 4):
        events = timeline(schedule, constant([1.0] * pp, m), constant([2.0] * pp, m))
        assert max(event.end_s for event in events) == pytest.approx((m + pp - 1) * 3.0)
        assert len(events) == pp * 2 * m


def test_1f1b_never_takes_longer_than_the_additive_form() -> None:
    shake = random.Random(0)
    for _ in range(60):
        pp, m = shake.choice([2, 3, 5]), shake.choice([1, 2, 7, 12])
        forward = [shake.uniform(0.2, 1) for _ in range(pp)]
        backward = [shake.uniform(0.2, 2) for _ in range(pp)]
        works = [f + b for f, b in zip(forward, backward, strict=True)]
        end = max(e.end_s for e in timeline("1f1b", constant(forward, m), constant(backward, m)))
        assert max(m * w for w in works) <= end <= (sum(works) + (m - 1) * max(works)) * (1 + 1e-9)


def test_stages_work_on_one_thing_at_a_time_and_after_their_input() -> None:
    events = timeline("1f1b", constant([1.0, 0.3, 2.0], 5), constant([0.7, 2.0, 1.0], 5), 0.1)
    ends = {(e.stage, e.kind, e.microbatch): e.end_s for e in events}
    for stage in range(3):
        own = [e for e in events if e.stage == stage]
        assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(own))
        for e in own:
            source = (stage - 1 if e.kind == "forward" else stage + 1, e.kind, e.microbatch)
            assert e.start_s >= ends.get(source, -0.1) + 0.1 - 1e-12
