"""Plans that the additive objective does not tell from one that it found, and the replay does.

Takes a Plan; gives others with the same layers, of the same strategies, on every stage.  Knows nothing of costs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from galvatron.core.model import ModelSpec
from galvatron.plan.plan import LayerStrategy, Plan


def twins(plan: Plan, spec: ModelSpec) -> Iterator[Plan]:
    """The plan under other schedules, and in other chunks.

    Few microbatches may all be in flight: 1F1B's plan under GPipe then has the same additive objective, and
    where receiving blocks the replay may tell them apart.  An interleaved plan may have room to put weight passes off,
    which shortens its bubble: what chunks hold at once is less than what each holds at most, which is all that the
    additive model can add up.
    """
    if plan.schedule == "1f1b" and plan.pp > 1 and 1 < plan.num_microbatches <= 2 * plan.pp:
        yield plan.model_copy(update={"schedule": "gpipe"})
    if plan.model_chunks == 1:
        return
    evened = [in_even_chunks(plan)] if len(spec.layers) == 1 and not spec.joints else []
    evened = [other for other in evened if other.layers_per_stage != plan.layers_per_stage]
    yield from evened
    if plan.schedule == "interleaved":
        yield from (each.model_copy(update={"schedule": "zero_bubble"}) for each in [plan, *evened])


def in_even_chunks(plan: Plan) -> Plan:
    """The same stages with as many layers in a chunk on every stage, but in the last, which takes what is left.

    Microbatches pass a chunk at the pace of its slowest stage: pp of them take pp · Σ over chunks of the slowest
    stage's passes, where the additive objective has the slowest stage's whole.  The two are equal if stages differ in
    one chunk alone, the last, where the head is: a stage that has fewer layers because of it would but wait in shorter
    chunks before.  With more microbatches the passes of several chunks meet, and which division is faster the replay
    says.  [Derived: replays of stages with a head of several layers, see the test.]
    """
    stages, chunks = stage_layers(plan), plan.model_chunks
    mean = len(plan.layers) // plan.pp
    before = min(mean - mean // chunks, min(map(len, stages)) - 1)
    each, left = divmod(before, chunks - 1)
    starts = [0, *itertools.accumulate(each + (chunk < left) for chunk in range(chunks - 1)), None]
    entries = [stage[start:stop] for start, stop in itertools.pairwise(starts) for stage in stages]
    divided = {"layers_per_stage": tuple(map(len, entries)), "layers": tuple(itertools.chain(*entries))}
    return plan.model_copy(update={**divided, "prediction": None})


def stage_layers(plan: Plan) -> list[tuple[LayerStrategy, ...]]:
    """The strategies of every stage's layers, in forward order."""
    layers = iter(plan.layers)
    entries = [tuple(itertools.islice(layers, k)) for k in plan.layers_per_stage]
    return [tuple(itertools.chain(*entries[stage :: plan.pp])) for stage in range(plan.pp)]
