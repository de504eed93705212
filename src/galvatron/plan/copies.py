"""Parameters that several stages of a pipeline hold: tables that are looked up, or projected to, in several places.

Takes a ModelSpec and a Plan; gives the stages of every copy.  Their gradients are summed.
"""

from __future__ import annotations

from galvatron.core.model import ModelSpec, ParameterSpec

from .plan import Plan

Copies = dict[tuple[int | None, str], tuple[int, ...]]
"""By layer (None: of the embedding) and name in it the stages, ascending, where there are several."""


def copies(spec: ModelSpec, plan: Plan) -> Copies:
    """What more than one stage of ``plan`` holds."""
    entries = [plan.chunk_layers(entry % plan.pp, entry // plan.pp) for entry in range(len(plan.layers_per_stage))]
    found: dict[tuple[int | None, str], set[int]] = {}
    if spec.embedding.parameters:
        table = spec.embedding.parameters[0].name
        at = {i for i, layers in enumerate(entries) if any(p.name == table for p in spec.embedding_within(layers))}
        found[None, table] = at | ({len(entries) - 1} if spec.tied_embeddings else set())
    for stack in spec.stack_ranges:
        for shared in (p for p in spec.kind_of_layers()[stack.start].parameters if p.shared):
            users = {i for i, layers in enumerate(entries) if layers.start < stack.stop and stack.start < layers.stop}
            found[stack.start, shared.name] = users
    stages = {key: tuple(sorted({entry % plan.pp for entry in at})) for key, at in found.items()}
    return {key: at for key, at in stages.items() if len(at) > 1}


def copied_to(spec: ModelSpec, layers: range) -> list[tuple[int, int, ParameterSpec]]:
    """What a stage with ``layers`` uses of a first layer elsewhere: (that layer, its first user here, parameter)."""
    found = []
    for stack in spec.stack_ranges:
        users = [index for index in layers if index in stack]
        if users and users[0] != stack.start:
            shared = (p for p in spec.kind_of_layers()[stack.start].parameters if p.shared)
            found += [(stack.start, users[0], p) for p in shared]
    return found
