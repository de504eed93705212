"""A search as one JSON object, for programs.

Takes a SearchResult; gives plain dictionaries, seconds and bytes with their unit in the key.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from galvatron.plan.plan import Plan
from galvatron.search.result import SearchResult, predicted
from galvatron.search.sensitivity import Change

from .compare import grown_s, short, slower_by

Object = dict[str, Any]


def summary(result: SearchResult, changes: Sequence[Change] = ()) -> Object:
    """The whole result.

    Keys: ``plan`` (the plan file's object), ``predicted``, ``proof``, ``search``, ``binding``, ``baselines``,
    ``candidates``, and ``sensitivity`` where ``changes`` were searched.  ``slower_by`` and ``faster_by`` are fractions
    of seconds a sample and of samples a second.
    """
    proof = result.prediction.proof
    assert proof is not None
    whole: Object = {
        "plan": json.loads(result.plan.to_json()),
        "predicted": _predicted(result),
        "proof": {"objective_s": proof.objective_s, "lower_bound_s": proof.lower_bound_s, "gap": proof.gap},
        "search": _search(result),
        "binding": _binding(result),
        "baselines": {name: _baseline(name, result) for name in result.baselines},
        "candidates": [_rival(plan, result.plan) for plan in result.candidates],
    }
    if changes:
        whole["sensitivity"] = [_change(change, result.plan) for change in changes]
    return whole


def _predicted(result: SearchResult) -> Object:
    plan, prediction = result.plan, result.prediction
    samples_per_s = plan.global_batch_size / prediction.step_time_s
    return {
        "step_time_s": prediction.step_time_s,
        "samples_per_s": samples_per_s,
        "tokens_per_s": samples_per_s * plan.seq_len,
        "parts_s": prediction.parts_s,
        "peak_memory_bytes": [stage.peak_memory_bytes for stage in prediction.stages],
        "memory_limit_bytes": result.memory_limit_bytes,
    }


def _search(result: SearchResult) -> Object:
    counts = result.counts
    return {
        "cpu_s": result.cpu_s,
        "tasks": counts.tasks,
        "solved": counts.solved,
        "bounded_away": counts.bounded_away,
        "infeasible": counts.infeasible,
        "replayed": counts.replayed,
        "strategies": counts.strategies,
        "stopped": result.stopped,
        "origins": dict(zip(("model", "hardware"), result.origins, strict=True)),
    }


def _binding(result: SearchResult) -> Object:
    """``constraint``: memory where more of it would be faster, none where not, null where that was not searched."""
    peaks = [stage.peak_memory_bytes for stage in result.prediction.stages]
    free, parts = result.unlimited, result.prediction.parts_s
    constraint = ("none" if free is None else "memory") if result.baselines else None
    return {
        "constraint": constraint,
        "fullest_stage": peaks.index(max(peaks)),
        "peak_memory_bytes": max(peaks),
        "unlimited": None if free is None else {**_rival(free, result.plan), "peak_memory_bytes": _peak(free)},
        "largest_part_beside_compute": max((name for name in parts if name != "compute"), key=parts.__getitem__),
    }


def _peak(plan: Plan) -> int:
    return predicted(plan).peak_memory_bytes


def _baseline(name: str, result: SearchResult) -> Object | None:
    plan = result.baselines[name]
    if plan is not None:
        return _rival(plan, result.plan)
    if name in result.shortfalls:
        shortfall = result.shortfalls[name]
        return {"bytes_short": shortfall.bytes_short, "stage": shortfall.stage, "plan": short(shortfall.plan)}
    return None


def _rival(plan: Plan, chosen: Plan) -> Object:
    return {
        "step_time_s": predicted(plan).step_time_s,
        "global_batch_size": plan.global_batch_size,
        "slower_by": slower_by(plan, chosen),
        "grown_s": grown_s(plan, chosen),
        "plan": short(plan),
    }


def _change(change: Change, chosen: Plan) -> Object:
    if change.plan is None:
        return {"change": change.words, "step_time_s": None}
    return {
        "change": change.words,
        "step_time_s": predicted(change.plan).step_time_s,
        "faster_by": 1 / (1 + slower_by(change.plan, chosen)) - 1,
        "plan": short(change.plan),
    }
