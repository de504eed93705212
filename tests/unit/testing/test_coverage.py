from __future__ import annotations

import dataclasses

import pytest

from galvatron.testing.coverage import Holding, check_holdings, find_gaps

ROW = Holding(
    rank=0,
    name="w",
    global_shape=(4, 6),
    boxes=(((0, 0), (2, 6)),),
    replicas=1,
    is_primary=True,
    checksum=7,
)
OTHER_ROW = dataclasses.replace(ROW, rank=1, boxes=(((2, 0), (2, 6)),))
SHAPES = {"w": (4, 6)}


@pytest.mark.parametrize(
    ("boxes", "complaint"),
    [
        ([((0, 0), (4, 6))], None),
        ([((0, 0), (2, 6)), ((2, 0), (2, 3)), ((2, 3), (2, 3))], None),
        ([((0, 0), (2, 6))], "12 of the 24"),
        ([((0, 0), (3, 6)), ((2, 0), (2, 6))], "overlap"),
        ([((2, 0), (3, 6))], "leaves shape"),
        ([((0, 0), (4, 6)), ((0, 0), (0, 6))], None),
    ],
)
def test_boxes_cover_exactly_once(boxes: list, complaint: str | None) -> None:
    found = find_gaps((4, 6), boxes)
    assert (found is None) if complaint is None else (complaint in (found or ""))


def test_a_scalar_is_one_element() -> None:
    assert find_gaps((), [((), ())]) is None


def test_a_sound_world_has_no_complaints() -> None:
    assert check_holdings([ROW, OTHER_ROW], SHAPES) == []


def test_ranks_that_hold_nothing_are_left_out() -> None:
    nothing = dataclasses.replace(ROW, rank=2, boxes=(((4, 0), (0, 6)),), is_primary=False)
    assert check_holdings([ROW, OTHER_ROW, nothing], SHAPES) == []


def test_replicas_share_bits_and_one_primary() -> None:
    replica = dataclasses.replace(ROW, rank=2, is_primary=False, replicas=2)
    first = dataclasses.replace(ROW, replicas=2)
    assert check_holdings([first, OTHER_ROW, replica], SHAPES) == []
    drifted = dataclasses.replace(replica, checksum=8)
    assert "different bits on ranks [0, 2]" in check_holdings([first, OTHER_ROW, drifted], SHAPES)[0]
    second_primary = dataclasses.replace(replica, is_primary=True)
    assert any("primaries [0, 2]" in c for c in check_holdings([first, OTHER_ROW, second_primary], SHAPES))


@pytest.mark.parametrize(
    ("holdings", "complaint"),
    [
        ([ROW], "12 of the 24"),
        ([ROW, dataclasses.replace(OTHER_ROW, is_primary=False)], "primaries"),
        ([ROW, dataclasses.replace(OTHER_ROW, replicas=2)], r"claims replicas=\[2\] but ranks \[1\]"),
        ([ROW, OTHER_ROW, dataclasses.replace(ROW, name="stray")], "no such parameter"),
        ([ROW, dataclasses.replace(OTHER_ROW, global_shape=(6, 4))], "global shape"),
        ([], "0 of the 24"),
    ],
)
def test_each_fault_is_named(holdings: list[Holding], complaint: str) -> None:
    import re

    assert any(re.search(complaint, found) for found in check_holdings(holdings, SHAPES))
