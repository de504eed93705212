"""What is fixed or bounded holds for embedding and head too, unless something else is said of them by name."""

from __future__ import annotations

import pytest

from galvatron.core.errors import ConfigError
from galvatron.cost import Setting
from galvatron.search import Limits, search
from galvatron.search.builder import SpaceBuilder
from unit.profiles import make_hardware, make_model, make_spec

MODEL, TIED = (make_model(make_spec(2, hidden=256, ffn=768, vocab=2000, tied=tied)) for tied in (False, True))
HARDWARE = make_hardware(4)


def degrees(unit: str, name: str, fix: list[str], at_most: list[str] | None = None, tied: bool = False) -> set[int]:
    """The values of a dimension that a unit may have on four devices."""
    model = TIED if tied else MODEL
    job = Setting(model, HARDWARE, 1, 1, 8, model.seq_len, "fp32", "fp32")
    rows = SpaceBuilder(job, Limits.parse(fix=fix, at_most=at_most or ()), 2**30).rows(4, unit)
    return set(getattr(rows, name).tolist())


@pytest.mark.parametrize("unit", ["embedding", "layer", "head"])
def test_what_is_said_of_a_dimension_is_said_of_all_units(unit: str) -> None:
    assert degrees(unit, "tp", []) == {1, 2, 4}
    assert degrees(unit, "tp", ["tp=2"]) == {2}
    assert degrees(unit, "tp", [], ["tp=2"]) == {1, 2}
    assert degrees(unit, "zero", ["zero=3"]) == {3}


def test_what_is_said_of_an_end_replaces_it_for_this_end_alone() -> None:
    units = ("embedding", "layer", "head")
    assert [degrees(unit, "tp", ["tp=1", "head.tp=4"]) for unit in units] == [{1}, {1}, {4}]
    assert [degrees(unit, "tp", ["tp=1"], ["embedding.tp=2"]) for unit in units] == [{1, 2}, {1}, {1}]
    assert [degrees(unit, "tp", ["embedding.tp=4"], ["tp=2"]) for unit in units] == [{4}, {1, 2}, {1, 2}]


@pytest.mark.parametrize("unit", ["embedding", "head"])
def test_of_tied_ends_what_is_said_of_one_is_said_of_both(unit: str) -> None:
    assert degrees(unit, "tp", ["embedding.tp=4"], ["tp=2"], tied=True) == {4}
    assert degrees(unit, "tp", ["head.tp=2"], tied=True) == {2}
    assert degrees(unit, "tp", [], ["embedding.tp=2", "head.tp=4"], tied=True) == {1, 2}


def test_ends_cut_by_ulysses_what_layers_cut_by_rings() -> None:
    assert degrees("layer", "cp", ["cp=2", "ulysses=1", "tp=1"]) == {2}
    assert degrees("head", "ulysses", ["cp=2", "ulysses=1", "tp=1"]) == {2}
    assert degrees("head", "ulysses", ["cp=2", "tp=1"]) == {1, 2, 4}
    assert degrees("head", "recompute", ["recompute=full"]) == {0}


@pytest.mark.parametrize("tied", [False, True])
def test_the_plan_has_what_was_fixed(tied: bool) -> None:
    limits = Limits.parse(fix=["tp=1", "embedding.tp=2", *([] if tied else ["head.tp=4"])])
    found = search(TIED if tied else MODEL, HARDWARE, global_batch_size=8, limits=limits, baselines=False)
    for plan in (found.plan, *found.candidates):
        assert (plan.embedding.tp, plan.head.tp) == (2, 2 if tied else 4)
        assert {strategy.tp for strategy in plan.layers} == {1}


@pytest.mark.parametrize(
    ("fix", "at_most", "said"),
    [
        (["embedding.tp=4", "head.tp=2"], [], "embedding.tp=4 and head.tp=2 cannot be"),
        (["embedding.tp=4"], ["head.tp=2"], "embedding.tp=4 and head.tp at most 2 cannot be"),
    ],
)
def test_tied_ends_of_which_different_things_are_said_are_refused(
    fix: list[str], at_most: list[str], said: str
) -> None:
    limits = Limits.parse(fix=fix, at_most=at_most)
    with pytest.raises(ConfigError, match=f"{said}, for the model's embedding and head are one tensor, cut alike; say"):
        search(TIED, HARDWARE, global_batch_size=8, limits=limits)
    assert search(MODEL, HARDWARE, global_batch_size=8, limits=limits, baselines=False).plan.embedding.tp == 4


@pytest.mark.parametrize(("option", "name"), [("fix", "--fix"), ("at_most", "--max")])
def test_what_is_said_twice_is_refused(option, name):
    with pytest.raises(ConfigError, match=f"{name} says tp=2 and tp=4; leave one of them out"):
        Limits.parse(**{option: ["tp=2", "tp=4"]})
    assert Limits.parse(**{option: ["tp=2", "TP=2"]}) == Limits.parse(**{option: ["tp=2"]})
