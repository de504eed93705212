"""Ways to run a twin by the modules that training uses: in stages, on one rank, and cut between two threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PretrainedConfig

from galvatron.core.model import LayerKind, ModelSpec, ParameterSpec
from galvatron.models import Family, experts_in, regions_in, spec_of, twin_model
from galvatron.plan import LayerStrategy, copied_to
from galvatron.plan.filling import Filling

from ..layers.attention import Context, attend_across, use_attention
from ..layers.sides import OwnSide
from ..layers.tensor_parallel import cut_embedding, cut_layer, cut_positions, shrink
from ..losses.fused import fuse_loss
from ..pipeline.passes import Outputs
from ..pipeline.stage import Stage
from ..pipeline.whole import WholeStage, stage_of
from ..processes.collectives import ALONE, AxisGroup
from ..processes.lockstep import Lockstep
from ..state.pieces import box, pieces_of
from .truth import SEQ_LEN, Gradients, batch_of

TP = 2


def _prepared(twin: PretrainedConfig, family: Family, layers: range, *, ends: tuple[bool, bool]) -> Stage:
    model = twin_model(twin)
    use_attention(model, family)
    return stage_of(model, family, layers, is_first=ends[0], is_last=ends[1]).train()


def in_stages(twin: PretrainedConfig, family: Family) -> tuple[float, Gradients]:
    """As many stages as layers, one after the other in one graph: every cut between layers."""
    inputs, labels = batch_of(twin)
    spec = spec_of(twin_model(twin), family=family)
    ends = spec.num_layers - 1
    stages = [_prepared(twin, family, range(i, i + 1), ends=(i == 0, i == ends)) for i in range(spec.num_layers)]
    _connect(stages)
    last = stages[-1]
    if family.head is not None:
        fuse_loss(last.last_modules[-1], spec.head.parameters[-1], ALONE, last.early_gradient)
    if isinstance(last, WholeStage):
        last.end_at_head()
    outputs, found = None, Gradients()
    for stage in stages[:-1]:
        outputs = _run(stage, inputs, received=outputs)
    loss = _loss(last, inputs, labels, outputs)
    for stage in stages:
        for name, path, _ in _named(spec, stage):
            _add(found, name, stage.model.get_parameter(path).grad)
    return loss, found


def _connect(stages: Sequence[Stage]) -> None:
    for stage in stages:
        if isinstance(stage, WholeStage):
            _see_sides(stage)
            stage.meet_neighbours(lambda _: ALONE)
        elif not stage.is_first:
            stage.receive_in(stage.layer(stage.layers.start))


def _see_sides(stage: WholeStage) -> None:
    """Let the layers of one rank see what other layers make for them."""
    for index in stage.layers:
        layer, side = stage.layer(index), stage.chain[index].stack.side
        attend_across(layer, Context())
        if side is not None:
            stage.side_of(LayerStrategy(), ALONE, lambda hidden: hidden).enter(layer, side)


def alone(twin: PretrainedConfig, family: Family) -> tuple[float, Gradients]:
    """All of it on one rank, by the modules that training uses."""
    spec = spec_of(twin_model(twin), family=family)
    stage = _cut_stage(twin, family, spec, ALONE, dict(twin_model(twin).named_parameters()))
    loss = _loss(stage, *batch_of(twin))
    found = {name: stage.model.get_parameter(path).grad for name, path, _ in _named(spec, stage)}
    return loss, {name: gradient for name, gradient in found.items() if gradient is not None}


def _loss(stage: Stage, inputs: dict[str, Tensor], labels: Tensor, received: Tensor | Outputs | None = None) -> float:
    """What a last stage comes to; its backward leaves the gradients."""
    share = _run(stage, inputs, labels, received)
    assert isinstance(share, Tensor)
    share.backward()
    return share.item()


def _run(
    stage: Stage, inputs: dict[str, Tensor], labels: Tensor | None = None, received: Tensor | Outputs | None = None
) -> Tensor | Outputs:
    if isinstance(stage, WholeStage):
        output: Tensor | Outputs = stage(received, inputs, labels)
    else:
        tokens = inputs["input_ids"] if received is None else received
        output = stage(tokens, torch.arange(SEQ_LEN).unsqueeze(0), labels)
    return output


def _add(found: Gradients, name: str, gradient: Tensor | None) -> None:
    if gradient is not None:
        found[name] = found[name] + gradient if name in found else gradient


def between_threads(twin: PretrainedConfig, family: Family) -> tuple[float, Gradients]:
    """All layers, cut between threads that meet at every collective."""
    spec = spec_of(twin_model(twin), family=family)
    values = dict(twin_model(twin).named_parameters())
    ranks, found = Lockstep(TP), Gradients()
    stages = [_cut_stage(twin, family, spec, AxisGroup(ranks, (TP,), rank), values) for rank in range(TP)]
    inputs, labels = batch_of(twin)
    loss = sum(ranks.run(lambda rank: _loss(stages[rank], inputs, labels)))
    for rank, stage in enumerate(stages):
        for name, path, parameter in _named(spec, stage):
            gradient = stage.model.get_parameter(path).grad
            if gradient is not None:
                _add(found, name, _spread(parameter, gradient, rank))
    return loss, found


def _named(spec: ModelSpec, stage: Stage) -> list[tuple[str, str, ParameterSpec]]:
    """Every parameter that a stage has by its name and its path there, a tied one once."""
    embedding, table = spec.embedding_within(stage.layers), spec.embedding.parameters[:1]
    named = [(p.name, stage.placed(p).name, p) for p in embedding]
    kinds = spec.kind_of_layers()
    own = [(index, p) for index in stage.layers for p in kinds[index].parameters]
    for index, p in (*own, *((index, p) for index, _, p in copied_to(spec, stage.layers))):
        path = f"{stage.chain[index].path}.{p.name}"
        named.append((path, path, p))
    if not stage.is_last:
        return named
    head, projection = spec.head.parameters, spec.head.parameters[-1]
    if spec.tied_embeddings:
        head = head[:-1]
        named += [] if table[0] in embedding else [(table[0].name, projection.name, projection)]
    return [*named, *((p.name, stage.placed(p).name, p) for p in head)]


def _cut_stage(
    twin: PretrainedConfig, family: Family, spec: ModelSpec, tp: AxisGroup, values: Mapping[str, Tensor]
) -> Stage:
    """One rank's part of a whole twin, with its part of ``values``."""
    stage = _prepared(twin, family, range(spec.num_layers), ends=(True, True))
    groups = [replace(tp, filling=_filling(spec, kind, tp.size)) for kind in spec.kind_of_layers()]
    _cut_tables(stage, spec, tp)
    _cut_layers(stage, spec, groups)
    stage.head_tp = tp
    if family.head is not None:
        _cut_head(stage, spec, tp)
    if isinstance(stage, WholeStage):
        _meet_whole(stage, groups)
    _take(stage, spec, tp, values)
    return stage


def _cut_tables(stage: Stage, spec: ModelSpec, tp: AxisGroup) -> None:
    for table in stage.tables:
        cut_embedding(table, spec.embedding.parameters[0], tp, whole=isinstance(stage, WholeStage))
        table.weight = stage.tables[0].weight
    length = SEQ_LEN // tp.size
    for positions in stage.position_tables():
        cut_positions(positions, (range(tp.rank * length, (tp.rank + 1) * length),))


def _cut_layers(stage: Stage, spec: ModelSpec, groups: Sequence[AxisGroup]) -> None:
    for index, kind in enumerate(spec.kind_of_layers()):
        layer, stack = stage.layer(index), stage.chain[index].stack
        cut_layer(layer, regions_in(layer, stack), kind, groups[index], experts_in(layer, stack))
        attend_across(layer, Context(tp=groups[index]))


def _cut_head(stage: Stage, spec: ModelSpec, tp: AxisGroup) -> None:
    head = stage.last_modules[-1]
    shrink(stage.model, tuple(stage.placed(p) for p in spec.head.parameters if p.cut is not None), tp)
    if spec.tied_embeddings:
        head.weight = stage.tables[0].weight
    fuse_loss(head, spec.head.parameters[-1], tp, stage.early_gradient)


@torch.no_grad()
def _take(stage: Stage, spec: ModelSpec, tp: AxisGroup, values: Mapping[str, Tensor]) -> None:
    """Give a rank its part of the ``values`` of all parameters."""
    for name, path, parameter in _named(spec, stage):
        local = stage.model.get_parameter(path)
        for piece in pieces_of(parameter, tp.size, tp.rank, 1, 0):
            whole = box(values[name], piece.global_offset, piece.size)
            box(local, piece.local_offset, piece.size).copy_(whole)


def _filling(spec: ModelSpec, kind: LayerKind, degree: int) -> Filling | None:
    patches = spec.patches(kind, SEQ_LEN if spec.task != "image_classification" else spec.max_seq_len)
    return Filling.up(patches, degree) if patches else None


def _meet_whole(stage: WholeStage, groups: Sequence[AxisGroup]) -> None:
    for index, link in enumerate(stage.chain):
        tp = groups[index]
        if link.is_first:
            stage.enter_from_whole(index, tp)
        if link.stack.side is not None:
            OwnSide(replace(tp, filling=None), lambda hidden: hidden).enter(stage.layer(index), link.stack.side)
        if link.is_last:
            stage.leave_whole(index, lambda hidden: hidden, tp)
    stage.end_at_head()


def _spread(parameter: ParameterSpec, gradient: Tensor, rank: int) -> Tensor:
    """A rank's gradient in its place of the whole parameter's."""
    whole = gradient.new_zeros(parameter.shape)
    for piece in pieces_of(parameter, TP, rank, 1, 0):
        box(whole, piece.global_offset, piece.size).copy_(box(gradient, piece.local_offset, piece.size))
    return whole
