"""The object for programs says what the explanation says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from galvatron.plan import Plan
from galvatron.report import summary
from galvatron.search import FAMILIES, Change, SearchResult, search
from galvatron.search.result import predicted
from unit.profiles import make_hardware, make_model, make_spec

MODEL, HARDWARE = make_model(make_spec(4, hidden=256, ffn=768, vocab=2000), flops_per_s=2e11), make_hardware(4)
TIGHT = 30 * 2**20


def find(**options: Any) -> SearchResult:
    return search(MODEL, HARDWARE, **{"global_batch_size": 8, "memory_limit_bytes": TIGHT, **options})


def test_the_plan_and_its_prediction() -> None:
    result = find()
    whole = json.loads(json.dumps(summary(result)))
    assert Plan.from_json(json.dumps(whole["plan"])) == result.plan
    predicted_, plan = whole["predicted"], result.plan
    assert predicted_["samples_per_s"] == pytest.approx(8 / predicted_["step_time_s"])
    assert predicted_["tokens_per_s"] == pytest.approx(8 * plan.seq_len / predicted_["step_time_s"])
    assert sum(predicted_["parts_s"].values()) == pytest.approx(predicted_["step_time_s"])
    assert len(predicted_["peak_memory_bytes"]) == plan.pp
    assert predicted_["memory_limit_bytes"] == TIGHT
    assert whole["proof"]["lower_bound_s"] <= whole["proof"]["objective_s"]
    assert whole["search"]["tasks"] == result.counts.tasks
    assert whole["search"]["stopped"] is None
    assert "sensitivity" not in whole


def test_what_binds_and_what_simple_plans_lose() -> None:
    result = find()
    whole = summary(result)
    assert whole["binding"]["constraint"] == "memory"
    assert whole["binding"]["unlimited"]["slower_by"] < 0
    assert set(whole["baselines"]) == set(FAMILIES)
    assert whole["baselines"]["dp"]["bytes_short"] > 0
    uniform = whole["baselines"]["uniform"]
    gained = uniform["step_time_s"] - result.prediction.step_time_s
    assert sum(uniform["grown_s"].values()) == pytest.approx(gained)
    assert len(whole["candidates"]) == len(result.candidates)
    assert summary(find(memory_limit_bytes=2**34))["binding"]["constraint"] == "none"


def test_what_was_not_searched_is_null() -> None:
    whole = summary(find(baselines=False))
    assert whole["binding"]["constraint"] is None
    assert whole["baselines"] == {}


def test_plans_of_other_batches_are_compared_by_the_sample() -> None:
    result = find(global_batch_size=(24, 32), memory_limit_bytes=2**34)
    for rival, plan in zip(summary(result)["candidates"], result.candidates, strict=True):
        ours, theirs = (predicted(p).step_time_s / p.global_batch_size for p in (result.plan, plan))
        assert rival["slower_by"] == pytest.approx(theirs / ours - 1)


def test_changes_are_listed() -> None:
    roomy = find(memory_limit_bytes=2**34)
    changes = (Change(words="more memory", plan=roomy.plan), Change(words="another node", plan=None))
    more, node = summary(find(), changes)["sensitivity"]
    assert more["faster_by"] > 0
    assert node == {"change": "another node", "step_time_s": None}
