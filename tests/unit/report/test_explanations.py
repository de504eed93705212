"""Explanations name what matters; timelines draw what was replayed."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from typing import Any

import pytest

from galvatron.core.model import Origin
from galvatron.core.units import format_seconds
from galvatron.cost import replay
from galvatron.cost.pipeline import Pipeline, timeline
from galvatron.report import draw_svg, draw_text, explain, explain_prediction
from galvatron.search import FAMILIES, Change, Limits, SearchResult, search
from unit.profiles import make_hardware, make_model, make_spec

MODEL, HARDWARE = make_model(make_spec(4, hidden=256, ffn=768, vocab=2000), flops_per_s=2e11), make_hardware(4)


def find(limit: int, **options: Any) -> SearchResult:
    return search(MODEL, HARDWARE, **{"global_batch_size": 8, "memory_limit_bytes": limit, **options})


def test_a_tight_limit_is_named_as_what_binds() -> None:
    result = find(30 * 2**20)
    text = explain(result)
    for line in result.plan.describe().split("\n"):
        assert line in text
    assert "memory: stage" in text
    assert "of 30.0 MiB" in text
    assert "data parallel alone: does not fit: its smallest plan is" in text
    assert "Runners-up" in text
    assert "gap 0.00%" in text


def test_enough_memory_does_not_bind() -> None:
    text = explain(find(2**34))
    assert "not memory" in text
    assert "does not fit" not in text
    for family in FAMILIES.values():
        assert f"  {family.words}: " in text


def test_a_rival_is_slower_by_the_parts_that_grew() -> None:
    result = find(30 * 2**20)
    rivals = explain(result).split("Runners-up")[1].split("Simple plans")[0].strip().split("\n")
    assert len(rivals) == len(result.candidates)
    slowest = rivals[-1]
    assert slowest.strip().startswith("+")
    assert any(f"{part} +" in slowest for part in ("communication", "recompute", "bubble", "compute", "optimizer"))


def test_a_rival_of_another_batch_is_compared_by_the_sample() -> None:
    result = find(2**34, global_batch_size=(28, 32))
    assert any(plan.global_batch_size != result.plan.global_batch_size for plan in result.candidates)
    lines = explain(result).split("Runners-up")[1].split("Simple plans")[0].strip().split("\n")
    for line, plan in zip(lines, result.candidates, strict=True):
        other = plan.global_batch_size != result.plan.global_batch_size
        assert (f"batch {plan.global_batch_size}, " in line) == other
        assert line.strip().startswith(("as fast", "+"))


def test_without_baselines_nothing_is_said_of_endless_memory() -> None:
    text = explain(find(30 * 2**20, baselines=False))
    assert "what more of it would buy was not searched" in text
    assert "Simple plans" not in text


def test_an_interrupted_search_says_so() -> None:
    assert "the search was interrupted" in explain(replace(find(2**34), stopped="interrupt"))
    assert "the search ran out of time" in explain(replace(find(2**34), stopped="time limit"))


@pytest.mark.parametrize(
    ("factor", "words"),
    [(1.0, None), (1.015, None), (0.985, None), (1.2, "20% more than that best"), (0.9, "10% less than that best")],
)
def test_a_replay_far_from_the_additive_model_is_told_apart_from_the_proof(factor: float, words: str | None) -> None:
    found = find(2**34, baselines=False)
    assert found.prediction.proof is not None
    step_time_s = factor * found.prediction.proof.objective_s
    prediction = found.prediction.model_copy(update={"step_time_s": step_time_s})
    sure = explain(replace(found, plan=found.plan.model_copy(update={"prediction": prediction}))).split("How sure")[1]
    if words is None:
        assert "replayed, the plan takes" not in sure
    else:
        assert f"replayed, the plan takes {format_seconds(step_time_s)}, {words}: " in sure


@pytest.mark.parametrize(
    ("basis", "fraction", "is_told"),
    [
        ("predicted from estimated profiles", 0.96, True),
        ("predicted from a measured model and estimated hardware", 0.96, True),
        ("predicted from estimated profiles", 0.94, False),
        ("predicted", 0.96, False),
        ("predicted from imported profiles", 1.0, False),
    ],
)
def test_an_estimate_that_nearly_fills_memory_asks_for_a_margin(basis: str, fraction: float, is_told: bool) -> None:
    plan = find(2**34, baselines=False).plan
    assert plan.prediction is not None
    limit = int(plan.prediction.peak_memory_bytes / fraction)
    prediction = plan.prediction.model_copy(update={"memory_limit_bytes": limit})
    text = explain_prediction(plan.model_copy(update={"prediction": prediction}), basis)
    assert ("measure a profile on the device, or let the limit (--memory) leave a margin" in text) == is_told


def test_what_would_help_is_listed() -> None:
    tight, roomy = find(30 * 2**20), find(2**34)
    changes = [Change(words="more memory", plan=roomy.plan), Change(words="another node", plan=None)]
    text = explain(tight, changes).split("What would help")[1]
    assert text.split("\n")[1].startswith("  more memory: +")
    assert text.split("\n")[2] == "  another node: no plan divides or fits"


@pytest.mark.parametrize(
    ("origins", "words"),
    [
        (("measured", "measured"), "(predicted)"),
        (("estimated", "estimated"), "(predicted from estimated profiles)"),
        (("imported", "estimated"), "(predicted from an imported model and estimated hardware)"),
        (("measured", "estimated"), "(predicted from a measured model and estimated hardware)"),
    ],
)
def test_what_the_numbers_rest_on_is_named(origins: tuple[Origin, Origin], words: str) -> None:
    assert words in explain(replace(find(2**34), origins=origins))


def test_a_prediction_alone_lists_time_and_memory_by_part() -> None:
    text = explain_prediction(find(30 * 2**20).plan)
    assert text.startswith("Step time")
    assert "% " in text
    assert "stage 0:" in text
    assert "parameters" in text


def test_the_text_timeline_of_a_small_pipeline() -> None:
    events = timeline(Pipeline("1f1b", 2, 2, [1, 1], [2, 2]))
    drawn = draw_text(events, 9.0, width=9)
    assert drawn.split("\n")[:2] == ["stage 0  01..aa.bb", "stage 1  .0aa1bb.."]


def test_weight_passes_are_capitals_in_the_text() -> None:
    events = timeline(Pipeline("zero_bubble", 2, 2, [1, 1], [1, 1], weight_s=[1, 1]))
    drawn = draw_text(events, max(event.end_s for event in events), width=8).split("\n")
    assert set(drawn[0].split("  ")[1]) >= {"0", "1", "a", "b", "A", "B"}
    assert "A-Z weight gradients" in drawn[2]


def test_every_kind_and_chunk_has_a_shade_and_a_place_in_the_legend() -> None:
    chunks = timeline(Pipeline("interleaved", 2, 2, [1] * 4, [2] * 4))
    root = ElementTree.fromstring(draw_svg(chunks, 20.0))
    assert len({box.get("fill") for box in root if box.tag.endswith("rect")}) == 4
    assert any(child.text == "forward, first to last chunk" for child in root)
    puts_off = timeline(Pipeline("zero_bubble", 2, 2, [1, 1], [1, 1], weight_s=[1, 1]))
    root = ElementTree.fromstring(draw_svg(puts_off, 20.0))
    assert len({box.get("fill") for box in root if box.tag.endswith("rect")}) == 3
    assert any(child.text == "weight gradients" for child in root)


def test_a_part_of_a_step_is_called_one() -> None:
    events = timeline(Pipeline("1f1b", 2, 2, [1, 1], [2, 2]))
    assert "only the first 2 microbatches, 9 s of 90 s" in draw_svg(events, 9.0, step_time_s=90.0)
    assert "only the first 2 microbatches, 9 s of 90 s" in draw_text(events, 9.0, step_time_s=90.0)


def test_the_svg_has_a_box_for_every_event() -> None:
    plan = find(2**34, limits=Limits(forbid=frozenset({"zero_bubble", "interleaved"}))).plan
    replayed = replay(plan, MODEL, HARDWARE)
    root = ElementTree.fromstring(draw_svg(replayed.events, replayed.step_time_s))
    boxes = [child for child in root if child.tag.endswith("rect")]
    assert len(boxes) == len(replayed.events) == plan.pp * 2 * plan.num_microbatches
    texts = [child.text for child in root if child.tag.endswith("text")]
    assert "stage 0" in texts
    assert "0 s" in texts
