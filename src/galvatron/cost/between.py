"""Seconds of what is done where stacks meet beside compute: messages, and parameters that are held there.

Takes a plan, its Setting and a stage's layers; gives times.  The additive objective leaves them out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np

from galvatron.core.model import UnitName
from galvatron.plan.copies import copies
from galvatron.plan.plan import LayerStrategy, Plan

from .communication import collective_s, redistribution_s, tied_reduction_s
from .memory import MASTER_BYTES
from .sequence import sequence_s
from .setting import Setting
from .sizes import shard_sizes
from .strategies import Floats, Strategies
from .unit import OF_PARAMETERS, UnitTimes, unit_times

Layout = tuple[UnitName, int]
"""What hidden states enter, and by how many their sequences are cut there."""


def layouts(plan: Plan, setting: Setting, layers: range) -> list[Layout]:
    """What hidden states pass in ``layers``, one by one; where a stack ends, the embedding's layout."""
    spec, kinds = setting.model.spec, setting.model.spec.kind_of_layers()
    ends = {spec.taken(joint) for joint in spec.joints}
    found: list[Layout] = []
    for index in layers:
        if not kinds[index].idle:
            found.append((kinds[index].name, plan.layers[index].sequence_degree))
        if index in ends:
            found.append((kinds[index].name, plan.embedding.sequence_degree))
    return found


def sides_s(plan: Plan, setting: Setting, layers: range) -> float:
    """One microbatch's all-to-alls, one way, of another stack's states to the layouts of layers that attend to them."""
    kinds, before = setting.model.spec.kind_of_layers(), plan.embedding.sequence_degree
    found = {(plan.layers[i].sequence_degree, side.name) for i in layers if (side := setting.side_kind(kinds[i].name))}
    return sum(redistribution_s(setting, name, before, degree) for degree, name in found)


def joined_times(plan: Plan, setting: Setting, layers: range, stage: int) -> UnitTimes | None:
    """What ``stage`` with ``layers`` does where stacks meet, as one unit more; None of a model of one stack.

    Where a stack ends, ranks that cut the embedding gather its states, and sum and gather what they look up in their
    parts of the vocabulary; backward is the adjoint.  Tables that several stages have are summed over them.
    """
    spec, kinds = setting.model.spec, setting.model.spec.kind_of_layers()
    if not spec.joints:
        return None
    joints = [joint for joint in spec.joints if joint.layer - 1 in layers]
    found, forward_s, backward_s = {field.name: np.zeros(()) for field in fields(UnitTimes)}, 0.0, 0.0
    for joint in spec.joints:  # a stage that begins among idle layers gathers what it is sent
        if (taken := spec.taken(joint)) in layers or taken < layers.start < joint.layer:
            gather_s, scatter_s = _sequence_s(setting, kinds[taken].name, plan.embedding)
            forward_s += gather_s
            backward_s += spec.is_reached(kinds[joint.layer].name) * scatter_s
    for joint in joints:
        table = spec.embedding.parameters[0]
        looks_up = (joint.table or table.name in joint.parameters) and table.cut is not None
        table_s = looks_up * sum(_sequence_s(setting, kinds[joint.layer].name, plan.embedding))
        forward_s += table_s
        backward_s += spec.is_reached(kinds[joint.layer].name) * table_s
    if setting.pp > 1 and joints and setting.parameters("embedding", layers):
        own = unit_times(setting, "embedding", plan.embedding, layers)
        alone = [unit_times(setting, "embedding", plan.embedding)] if layers.start == 0 else []
        found |= {name: getattr(own, name) - sum(getattr(of, name) for of in alone) for name in OF_PARAMETERS}
    found |= {"tensor_parallel_forward_s": np.array(forward_s), "tensor_parallel_backward_s": np.array(backward_s)}
    if spec.task == "contrast" and layers.stop == spec.num_layers:
        found |= _contrast_s(plan, setting, found)
    return UnitTimes(**found | {"tied_s": np.array(_tied_s(plan, setting, stage))})


def _contrast_s(plan: Plan, setting: Setting, so_far: dict[str, Floats]) -> dict[str, Floats]:
    """Embeddings of both towers gathered from all data-parallel ranks, and sums of the numbers beside all layers.

    A sigmoid of every pair (with a bias) looks at images alone from elsewhere, and gives only these a gradient.
    """
    spec, head = setting.model.spec, plan.head
    width = next(p.shape[0] for p in reversed(spec.head.parameters) if len(p.shape) == 2)
    num_bytes, summed = setting.micro_batch_size * width * MASTER_BYTES, MASTER_BYTES * len(spec.numbers)
    gather_s = collective_s(setting, "all_gather", head.dp, head.tp, num_bytes)
    scatter_s = collective_s(setting, "reduce_scatter", head.dp, head.tp, num_bytes)
    back = 1 if len(spec.numbers) > 1 else 2
    over_tp_s = summed * setting.links("all_reduce", np.array(head.tp), np.array(1))[1]
    return {
        "data_parallel_forward_s": so_far["data_parallel_forward_s"] + 2 * gather_s,
        "data_parallel_backward_s": so_far["data_parallel_backward_s"] + back * scatter_s,
        "last_s": so_far["last_s"] + collective_s(setting, "all_reduce", head.dp, head.tp, summed),
        "replicated_s": so_far["replicated_s"] + over_tp_s,
    }


def without_tied(times: Sequence[UnitTimes]) -> tuple[UnitTimes, ...]:
    """``times`` of units whose tied sums are counted by ``joined_times``."""
    return tuple(replace(unit, tied_s=0.0 * unit.tied_s) for unit in times)


def _sequence_s(setting: Setting, unit: UnitName, strategy: LayerStrategy) -> tuple[float, float]:
    """A gather and a scatter of one microbatch's hidden states in ``unit`` over the ranks of ``strategy``."""
    batch = np.array([setting.micro_batch_size / strategy.dp])
    gather_s, scatter_s = sequence_s(setting, unit, Strategies.of([strategy]), batch)
    return float(gather_s[0]), float(scatter_s[0])


def _tied_s(plan: Plan, setting: Setting, stage: int) -> float:
    """Sums of the gradients of what ``stage`` and others have: one for all that the same stages do."""
    spec, kinds = setting.model.spec, setting.model.spec.kind_of_layers()
    num_bytes: dict[tuple[int, ...], int] = defaultdict(int)
    for (layer, name), at in copies(spec, plan).items():
        parameters = spec.embedding.parameters if layer is None else kinds[layer].parameters
        shared = [p for p in parameters if p.name == name and p.trainable]
        strategy = plan.embedding if layer is None else plan.layers[layer].replicated
        num_bytes[at] += MASTER_BYTES * int(shard_sizes(shared, Strategies.of([strategy]))[0].held[0])
    own = [np.array(n) for at, n in num_bytes.items() if stage in at and n > 0]
    return sum(float(tied_reduction_s(setting, n)) for n in own)
