"""Two predicted plans side by side: how much slower one is, and by which parts of the step.

Plans of different batches are compared by seconds a sample, stretched to the batch of the plan they are held against.
"""

from __future__ import annotations

from galvatron.core.units import counted, format_bytes, format_seconds
from galvatron.plan.plan import LayerStrategy, Part, Plan, runs
from galvatron.search.result import predicted, seconds_per_sample

PART_WORDS: dict[Part, str] = {
    "compute": "compute",
    "tensor_parallel": "tensor-parallel communication",
    "context_parallel": "context-parallel communication",
    "expert_parallel": "expert-parallel communication",
    "data_parallel": "data-parallel communication",
    "recompute": "recompute",
    "redistribution": "redistribution between layouts",
    "pipeline_p2p": "messages between stages",
    "pipeline_bubble": "pipeline bubble",
    "optimizer": "optimizer",
}
NOTICEABLE = 0.005  # differences under half a percent of the step are left out of explanations
MAX_CAUSES = 3


def slower_by(plan: Plan, chosen: Plan) -> float:
    """By which fraction a sample takes longer than under ``chosen``; negative where it is faster."""
    return seconds_per_sample(plan) / seconds_per_sample(chosen) - 1


def grown_s(plan: Plan, chosen: Plan) -> dict[Part, float]:
    """Seconds by which every part of the step is longer than in ``chosen``, over a batch as large as its."""
    stretch = chosen.global_batch_size / plan.global_batch_size
    ours, theirs = predicted(chosen).parts_s, predicted(plan).parts_s
    return {name: stretch * theirs[name] - ours[name] for name in PART_WORDS}


def behind(plan: Plan, chosen: Plan) -> str:
    """How much slower than the chosen plan, and which parts grew."""
    slower = slower_by(plan, chosen)
    if abs(slower) < NOTICEABLE:
        more = predicted(plan).peak_memory_bytes - predicted(chosen).peak_memory_bytes
        memory = f", {format_bytes(abs(more))} {'more' if more > 0 else 'less'} memory" if more else ""
        return f"as fast{memory}."
    causes = _causes(grown_s(plan, chosen), NOTICEABLE * predicted(chosen).step_time_s, 1 if slower > 0 else -1)
    return f"{slower:+.1%}: {causes}." if causes else f"{slower:+.1%}."


def _causes(grown: dict[Part, float], least_s: float, sign: int) -> str:
    """The parts that changed most in the direction of the whole."""
    names = sorted((name for name in grown if sign * grown[name] >= least_s), key=lambda name: -sign * grown[name])
    return ", ".join(
        f"{PART_WORDS[name]} {'+' if grown[name] > 0 else '-'}{format_seconds(abs(grown[name]))}"
        for name in names[:MAX_CAUSES]
    )


def short(plan: Plan, chosen: Plan | None = None) -> str:
    """A plan in one line: pipeline, microbatches and the strategies of its layers by how many use them.

    The global batch is named where it is not that of ``chosen``.
    """
    used: dict[LayerStrategy, int] = {}
    for first, last, strategy in runs(plan.layers):
        used[strategy] = used.get(strategy, 0) + last - first + 1
    layers = "; ".join(
        f"{counted(count, 'layer')} {strategy}" for strategy, count in sorted(used.items(), key=lambda item: -item[1])
    )
    other = chosen is not None and plan.global_batch_size != chosen.global_batch_size
    batch = f"batch {plan.global_batch_size}, " if other else ""
    return f"{batch}{stages(plan)}, {counted(plan.num_microbatches, 'microbatch')}: {layers}"


def stages(plan: Plan) -> str:
    """``4 stages x 2 chunks interleaved``."""
    chunks = f" x {plan.model_chunks} chunks" if plan.model_chunks > 1 else ""
    schedule = f" {plan.schedule}" if plan.pp > 1 else ""
    return f"{counted(plan.pp, 'stage')}{chunks}{schedule}"


def same_layers(a: Plan, b: Plan) -> bool:
    """Whether two plans divide and cut their layers alike."""
    return (a.layers_per_stage, a.layers) == (b.layers_per_stage, b.layers)
