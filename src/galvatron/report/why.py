"""Why this plan: what it takes, what binds it, who came second and why, and what simple plans would have cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from galvatron.core.units import counted, format_bytes, format_rate, format_seconds
from galvatron.plan.plan import Plan
from galvatron.search.baselines import FAMILIES
from galvatron.search.result import SearchResult, Shortfall, predicted
from galvatron.search.sensitivity import Change

from .compare import NOTICEABLE, PART_WORDS, behind, same_layers, short, slower_by

MEMORY_WORDS = {
    "parameter_bytes": "parameters",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer",
    "unsharded_bytes": "unsharded",
    "activation_bytes": "activations",
    "workspace_bytes": "workspace",
    "runtime_bytes": "runtime",
}
MAX_STAGES = 8  # of more stages the memory of the fullest alone is listed
TOLD_APART = 0.02  # where the replay differs from the additive model by more, the proof says so
NEARLY_FULL = 0.95  # [Assumed] of the memory limit; what is left is less than an estimate may be off by


def explain(result: SearchResult, changes: Sequence[Change] = ()) -> str:
    """The whole explanation of a search, as lines of plain text; ``changes``: what would help."""
    lines = ["Plan", *_indented(result.plan.describe().split("\n"))]
    lines += ["", *explain_prediction(result.plan, basis(result)).split("\n")]
    lines += ["", "What binds", *_indented(_binding(result))]
    if changes:
        lines += ["", "What would help", *_indented(_change(change, result.plan) for change in changes)]
    if result.candidates:
        lines += ["", "Runners-up", *_indented(_rival(plan, result.plan) for plan in result.candidates)]
    if result.baselines:
        lines += ["", "Simple plans", *_indented(_baseline(name, result) for name in result.baselines)]
    return "\n".join([*lines, "", "How sure", *_indented(_proof(result))])


def basis(result: SearchResult) -> str:
    """What the numbers rest on: ``predicted``, and which of the profiles were not measured here."""
    model, hardware = result.origins
    if model == hardware:
        return "predicted" if model == "measured" else f"predicted from {model} profiles"
    return f"predicted from {'an' if model != 'measured' else 'a'} {model} model and {hardware} hardware"


def explain_prediction(plan: Plan, basis: str = "predicted") -> str:
    """What a predicted plan promises: step time and memory with their parts."""
    prediction = predicted(plan)
    samples_per_s = plan.global_batch_size / prediction.step_time_s
    rates = f"{format_rate(samples_per_s)} samples/s, {format_rate(samples_per_s * plan.seq_len)} tokens/s"
    engine = ", layers compiled" if prediction.compiled else ""
    lines = [f"Step time {format_seconds(prediction.step_time_s)}, {rates} ({basis}{engine})"]
    for name, seconds in sorted(prediction.parts_s.items(), key=lambda part: -part[1]):
        share = seconds / prediction.step_time_s
        if share >= NOTICEABLE:
            lines.append(f"  {share:4.0%}  {PART_WORDS[name]}, {format_seconds(seconds)}")
    return "\n".join([*lines, *_memory(plan, basis)])


def _memory(plan: Plan, basis: str) -> Iterator[str]:
    prediction = predicted(plan)
    of_limit = "" if prediction.memory_limit_bytes is None else f" of {format_bytes(prediction.memory_limit_bytes)}"
    fullest = max(prediction.stages, key=lambda stage: stage.peak_memory_bytes)
    yield f"Memory, fullest rank of each stage ({basis})"
    for index, stage in enumerate(prediction.stages):
        if len(prediction.stages) > MAX_STAGES and stage is not fullest:
            continue
        parts = [(getattr(stage, field), word) for field, word in MEMORY_WORDS.items()]
        held = ", ".join(f"{word} {format_bytes(size)}" for size, word in sorted(parts, reverse=True) if size)
        yield f"  stage {index}: {format_bytes(stage.peak_memory_bytes)}{of_limit}: {held}"
    if len(prediction.stages) > MAX_STAGES:
        least = min(stage.peak_memory_bytes for stage in prediction.stages)
        yield f"  the other {counted(len(prediction.stages) - 1, 'stage')}: {format_bytes(least)} or more"
    limit = prediction.memory_limit_bytes
    if "estimated" in basis and limit is not None and fullest.peak_memory_bytes > NEARLY_FULL * limit:
        yield (
            "  what is left is less than an estimate may be off by: measure a profile on the device, or let the limit "
            "(--memory) leave a margin"
        )


def _indented(lines: Iterator[str] | list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _binding(result: SearchResult) -> Iterator[str]:
    prediction, free = result.prediction, result.unlimited
    peaks = [stage.peak_memory_bytes for stage in prediction.stages]
    fullest = peaks.index(max(peaks))
    room = f"stage {fullest} needs {format_bytes(peaks[fullest])} of {format_bytes(result.memory_limit_bytes)}"
    if not result.baselines:
        yield f"memory: {room}; what more of it would buy was not searched"
    elif free is None:
        yield f"not memory ({room}): no plan is faster with more of it"
    else:
        saved = -slower_by(free, result.plan)
        gain = f"{saved:.1%} faster" if saved >= NOTICEABLE else "hardly faster"
        need, step = format_bytes(predicted(free).peak_memory_bytes), format_seconds(predicted(free).step_time_s)
        yield f"memory: {room}; with {need} a step could take {step} ({gain})"
        yield f"by {short(free, result.plan)}"
    others = {name: part for name, part in prediction.parts_s.items() if name != "compute"}
    name = max(others, key=lambda part: others[part])
    share, compute = others[name] / prediction.step_time_s, prediction.parts_s["compute"] / prediction.step_time_s
    yield f"{compute:.0%} of the step is compute; the largest other part is {PART_WORDS[name]} ({share:.0%})"


def _change(change: Change, chosen: Plan) -> str:
    if change.plan is None:
        return f"{change.words}: no plan divides or fits"
    faster = 1 / (1 + slower_by(change.plan, chosen)) - 1
    gain = f"{faster:+.1%} samples/s" if abs(faster) >= NOTICEABLE else "hardly anything"
    return f"{change.words}: {gain}, {format_seconds(predicted(change.plan).step_time_s)} a step"


def _rival(plan: Plan, chosen: Plan) -> str:
    return f"{behind(plan, chosen)}  {short(plan, chosen)}"


def _baseline(name: str, result: SearchResult) -> str:
    plan, words = result.baselines[name], FAMILIES[name].words
    if plan is not None:
        same = "the same layers, " if same_layers(plan, result.plan) else ""
        return f"{words}: {same}{behind(plan, result.plan)}  {short(plan, result.plan)}"
    if name in result.shortfalls:
        return f"{words}: does not fit: {_short_by(result.shortfalls[name])}"
    return f"{words}: not possible for this model, batch and world"


def _short_by(shortfall: Shortfall) -> str:
    where = f" on stage {shortfall.stage}" if shortfall.plan.pp > 1 else ""
    return f"its smallest plan is {format_bytes(shortfall.bytes_short)} too large{where}: {short(shortfall.plan)}"


def _proof(result: SearchResult) -> Iterator[str]:
    proof, counts = result.prediction.proof, result.counts
    assert proof is not None
    if result.stopped:
        stopped = {"interrupt": "was interrupted", "time limit": "ran out of time"}[result.stopped]
        yield f"the search {stopped}: this is the best plan so far, and the gap says what it may have missed"
    yield (
        f"no plan of the space is below {format_seconds(proof.lower_bound_s)} in the additive model, whose best is "
        f"{format_seconds(proof.objective_s)} (gap {proof.gap:.2%})"
    )
    apart = result.prediction.step_time_s / proof.objective_s - 1
    if abs(apart) > TOLD_APART:
        yield (
            f"replayed, the plan takes {format_seconds(result.prediction.step_time_s)}, {abs(apart):.0%} "
            f"{'more' if apart > 0 else 'less'} than that best: the additive model only approximates how stages wait "
            "for each other, and leaves out what is done where stacks meet and what chunks gain by putting weight "
            "passes off; the bound is of that model alone"
        )
    yield (
        f"{counted(counts.tasks, 'combination')} of batch, stages, microbatches and schedule, up to "
        f"{counts.strategies:,} strategies a layer: {counts.solved} solved, {counts.bounded_away} ruled out by their "
        f"bound, {counts.infeasible} do not fit; {counted(counts.replayed, 'plan')} replayed; "
        f"{proof.cpu_s:.1f} s of CPU"
    )
