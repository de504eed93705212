"""Why this plan: what it takes, what binds it, who came second and why, and what simple plans would have cost."""

from __future__ import annotations

from collections.abc import Iterator

from galvatron.core.units import format_bytes, format_seconds
from galvatron.plan.plan import LayerStrategy, Plan, Prediction, runs
from galvatron.search.result import SearchResult, Shortfall

PART_WORDS = {
    "compute": "compute",
    "tensor_parallel": "tensor-parallel communication",
    "data_parallel": "data-parallel communication",
    "recompute": "recompute",
    "redistribution": "redistribution between layouts",
    "pipeline_p2p": "messages between stages",
    "pipeline_bubble": "pipeline bubble",
    "optimizer": "optimizer",
}
MEMORY_WORDS = {
    "parameter_bytes": "parameters",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer",
    "unsharded_bytes": "unsharded",
    "activation_bytes": "activations",
    "workspace_bytes": "workspace",
    "runtime_bytes": "runtime",
}
FAMILY_WORDS = {
    "dp": "data parallel alone",
    "zero3": "ZeRO 3 alone",
    "tp": "tensor parallel alone",
    "pp": "pipeline alone",
    "uniform": "one strategy for all layers",
}
NOTICEABLE = 0.005  # differences under half a percent of the step are left out of explanations
MAX_CAUSES = 3


def explain(result: SearchResult) -> str:
    """The whole explanation of a search, as lines of plain text."""
    lines = ["Plan", *_indented(result.plan.describe().split("\n"))]
    lines += ["", *explain_prediction(result.plan).split("\n")]
    lines += ["", "What binds", *_indented(_binding(result))]
    if result.candidates:
        lines += ["", "Runners-up", *_indented(_rival(plan, result.plan) for plan in result.candidates)]
    lines += ["", "Simple plans", *_indented(_baseline(name, result) for name in result.baselines)]
    return "\n".join([*lines, "", "How sure", *_indented(_proof(result))])


def explain_prediction(plan: Plan) -> str:
    """What a predicted plan promises: step time and memory with their parts."""
    prediction = _prediction(plan)
    lines = [f"Step time {format_seconds(prediction.step_time_s)} (predicted)"]
    for name, seconds in sorted(prediction.parts_s.items(), key=lambda part: -part[1]):
        share = seconds / prediction.step_time_s
        if share >= NOTICEABLE:
            lines.append(f"  {share:4.0%}  {PART_WORDS[name]}, {format_seconds(seconds)}")
    limit = prediction.memory_limit_bytes
    of_limit = "" if limit is None else f" of {format_bytes(limit)}"
    lines.append("Memory, fullest rank of each stage (predicted)")
    for index, stage in enumerate(prediction.stages):
        parts = [(getattr(stage, field), word) for field, word in MEMORY_WORDS.items()]
        held = ", ".join(f"{word} {format_bytes(size)}" for size, word in sorted(parts, reverse=True) if size)
        lines.append(f"  stage {index}: {format_bytes(stage.peak_memory_bytes)}{of_limit}: {held}")
    return "\n".join(lines)


def _indented(lines: Iterator[str] | list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _prediction(plan: Plan) -> Prediction:
    assert plan.prediction is not None
    return plan.prediction


def _step_s(plan: Plan) -> float:
    return _prediction(plan).step_time_s


def _binding(result: SearchResult) -> Iterator[str]:
    prediction, limit = _prediction(result.plan), result.memory_limit_bytes
    peaks = [stage.peak_memory_bytes for stage in prediction.stages]
    fullest = peaks.index(max(peaks))
    room = f"stage {fullest} needs {format_bytes(peaks[fullest])} of {format_bytes(limit)}"
    if result.unlimited is None:
        yield f"not memory ({room}): no plan is faster with more of it"
    else:
        free = result.unlimited
        saved = 1 - _step_s(free) / _step_s(result.plan)
        need = format_bytes(_prediction(free).peak_memory_bytes)
        gain = f"{saved:.1%} faster" if saved >= NOTICEABLE else "hardly faster"
        yield f"memory: {room}; with {need} a step could take {format_seconds(_step_s(free))} ({gain})"
        yield f"by {_short(free)}"
    others = {name: part for name, part in prediction.parts_s.items() if name != "compute"}
    name = max(others, key=lambda part: others[part])
    share, compute = others[name] / prediction.step_time_s, prediction.parts_s["compute"] / prediction.step_time_s
    yield f"{compute:.0%} of the step is compute; the largest other part is {PART_WORDS[name]} ({share:.0%})"


def _short(plan: Plan) -> str:
    """A plan in one line: pipeline, microbatches and the strategies of its layers by how many use them."""
    stages = f"{plan.pp} stage{'s' * (plan.pp > 1)}"
    counts: dict[LayerStrategy, int] = {}
    for first, last, strategy in runs(plan.layers):
        counts[strategy] = counts.get(strategy, 0) + last - first + 1
    layers = "; ".join(
        f"{count} layer{'s' * (count > 1)} {strategy}"
        for strategy, count in sorted(counts.items(), key=lambda item: -item[1])
    )
    schedule = f" {plan.schedule}" if plan.pp > 1 else ""
    return f"{stages}{schedule}, {plan.num_microbatches} microbatch{'es' * (plan.num_microbatches > 1)}: {layers}"


def _rival(plan: Plan, chosen: Plan) -> str:
    return f"{_behind(plan, chosen)}  {_short(plan)}"


def _behind(plan: Plan, chosen: Plan) -> str:
    """How much slower than the chosen plan, and which parts grew."""
    ours, theirs = _prediction(chosen), _prediction(plan)
    slower = theirs.step_time_s / ours.step_time_s - 1
    if abs(slower) < NOTICEABLE:
        more = theirs.peak_memory_bytes - ours.peak_memory_bytes
        memory = f", {format_bytes(abs(more))} {'more' if more > 0 else 'less'} memory" if more else ""
        return f"as fast{memory}."
    grown = {name: theirs.parts_s[name] - ours.parts_s[name] for name in PART_WORDS}
    sign = 1 if slower > 0 else -1
    causes = sorted(
        (name for name in grown if sign * grown[name] >= NOTICEABLE * ours.step_time_s), key=grown.__getitem__
    )
    listed = ", ".join(
        f"{PART_WORDS[name]} {'+' if grown[name] > 0 else '-'}{format_seconds(abs(grown[name]))}"
        for name in causes[::-sign][:MAX_CAUSES]
    )
    return f"{slower:+.1%}: {listed}." if listed else f"{slower:+.1%}."


def _baseline(name: str, result: SearchResult) -> str:
    plan, words = result.baselines[name], FAMILY_WORDS.get(name, name)
    if plan is not None:
        same = (plan.layers_per_stage, plan.layers) == (result.plan.layers_per_stage, result.plan.layers)
        return f"{words}: {'the same layers, ' if same else ''}{_behind(plan, result.plan)}  {_short(plan)}"
    if name in result.shortfalls:
        return f"{words}: does not fit: {_short_by(result.shortfalls[name])}"
    return f"{words}: not possible for this model, batch and world"


def _short_by(shortfall: Shortfall) -> str:
    where = f" on stage {shortfall.stage}" if shortfall.plan.pp > 1 else ""
    return f"its smallest plan is {format_bytes(shortfall.bytes_short)} too large{where}: {_short(shortfall.plan)}"


def _proof(result: SearchResult) -> Iterator[str]:
    proof, counts = _prediction(result.plan).proof, result.counts
    assert proof is not None
    yield (
        f"no plan of the space is below {format_seconds(proof.lower_bound_s)} in the additive model, whose best is "
        f"{format_seconds(proof.objective_s)} (gap {proof.gap:.2%})"
    )
    yield (
        f"{counts.tasks} combinations of stages, microbatches and schedule: {counts.solved} solved exactly, "
        f"{counts.bounded_away} ruled out by their bound, {counts.infeasible} do not fit; "
        f"{counts.replayed} plans replayed; {proof.cpu_s:.1f} s of CPU"
    )
