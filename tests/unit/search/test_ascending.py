"""The order of bounds, and how few of them it asks for."""

from __future__ import annotations

import math

from galvatron.search.ascending import Ascending


def test_things_come_by_their_closest_bound_and_only_the_first_are_asked() -> None:
    close, asked = [5.0, 2.0, 9.0, 4.0, math.inf, 7.0], []

    def closer(i: int) -> float:
        asked.append(i)
        return close[i]

    order, found = Ascending([1.0, 2.0, 3.0, 4.0, 1.0, 6.0], (closer,)), []
    while (i := order.first(4.5)) is not None:
        found.append((order.least, i))
        order.drop()
    assert found == [(2.0, 1), (4.0, 3)]
    assert sorted(asked) == [0, 1, 2, 3, 4]  # the floor of the last one was enough
    assert order.least == 5.0
    assert order.left == [(5.0, 0), (6.0, 5), (9.0, 2), (math.inf, 4)]


def test_a_looser_answer_never_lowers_a_bound() -> None:
    order = Ascending([3.0], (lambda i: 1.0, lambda i: 2.0))
    assert order.first(math.inf) == 0
    assert order.least == 3.0
    order.drop()
    assert order.least == math.inf


def test_the_least_holds_when_asking_is_interrupted() -> None:
    def interrupted(_: int) -> float:
        raise KeyboardInterrupt

    order = Ascending([2.0, 1.0], (interrupted,))
    try:
        order.first(math.inf)
    except KeyboardInterrupt:
        assert order.least == 1.0
        assert order.left == [(1.0, 1), (2.0, 0)]
