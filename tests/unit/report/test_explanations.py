"""Explanations name what matters; timelines draw what was replayed."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from galvatron.cost import replay
from galvatron.cost.pipeline import timeline
from galvatron.report import draw_svg, draw_text, explain, explain_prediction
from galvatron.search import SearchResult, search
from unit.profiles import make_hardware, make_model, make_spec

MODEL, HARDWARE = make_model(make_spec(4, hidden=256, ffn=768, vocab=2000), flops_per_s=2e11), make_hardware(4)


def find(limit: int) -> SearchResult:
    return search(MODEL, HARDWARE, global_batch_size=8, memory_limit_bytes=limit)


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
    assert "one strategy for all layers:" in text


def test_a_rival_is_slower_by_the_parts_that_grew() -> None:
    result = find(30 * 2**20)
    rivals = explain(result).split("Runners-up")[1].split("Simple plans")[0].strip().split("\n")
    assert len(rivals) == len(result.candidates)
    slowest = rivals[-1]
    assert slowest.strip().startswith("+")
    assert any(f"{part} +" in slowest for part in ("communication", "recompute", "bubble", "compute", "optimizer"))


def test_a_prediction_alone_lists_time_and_memory_by_part() -> None:
    text = explain_prediction(find(30 * 2**20).plan)
    assert text.startswith("Step time")
    assert "% " in text
    assert "stage 0:" in text
    assert "parameters" in text


def test_the_text_timeline_of_a_small_pipeline() -> None:
    events = timeline("1f1b", [[1, 1], [1, 1]], [[2, 2], [2, 2]])
    drawn = draw_text(events, 9.0, width=9)
    assert drawn.split("\n")[:2] == ["stage 0  01..aa.bb", "stage 1  .0aa1bb.."]


def test_the_svg_has_a_box_for_every_event() -> None:
    plan = find(2**34).plan
    replayed = replay(plan, MODEL, HARDWARE)
    root = ElementTree.fromstring(draw_svg(replayed.events, replayed.step_time_s))
    boxes = [child for child in root if child.tag.endswith("rect")]
    assert len(boxes) == len(replayed.events) == plan.pp * 2 * plan.num_microbatches
    texts = [child.text for child in root if child.tag.endswith("text")]
    assert "stage 0" in texts
    assert "0 s" in texts
