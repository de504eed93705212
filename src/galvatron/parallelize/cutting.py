"""What is done to a stage's modules before their parameters have memory: cuts, attention, recompute, compilation.

Takes a model on meta and this rank's place in the grid; gives stages whose forward is that of the plan.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from galvatron.core.model import ModelSpec
from galvatron.models import Family, chain_of, experts_in, lasting_buffers, regions_in
from galvatron.plan import LayerStrategy, Plan
from galvatron.plan.filling import Filling, filling_of

from .layers.alike_rows import told_of_own_rows
from .layers.attention import Context, attend_across
from .layers.capacity import Capacity, without_nobody
from .layers.compile import LayerCompiler
from .layers.documents import OwnPlaces
from .layers.drop_path import drop_alike
from .layers.forward import change_layout, enter_with_layout
from .layers.later import Later, put_off
from .layers.recompute import recompute_in_backward
from .layers.tensor_parallel import cut_embedding, cut_layer, cut_positions, shrink, tap_linears
from .losses.balance import Balance
from .losses.fused import fuse_loss
from .losses.loads import Loads
from .pipeline.stage import Stage
from .pipeline.standins import pass_on
from .pipeline.whole import WholeStage, stage_of
from .processes.collectives import AxisGroup
from .processes.grid import Grid
from .sharding.fsdp import DTYPES


def stages_of(model: PreTrainedModel, family: Family, grid: Grid) -> Iterator[Stage]:
    """This rank's model chunks in forward order, each in a skeleton (on meta) of its own."""
    plan, last = grid.plan, len(grid.plan.layers_per_stage) - 1
    skeletons = [model, *(copy.deepcopy(model) for _ in range(plan.model_chunks - 1))]
    for chunk, skeleton in enumerate(skeletons):
        entry = chunk * plan.pp + grid.stage
        layers = plan.chunk_layers(grid.stage, chunk)
        stage = stage_of(skeleton, family, layers, is_first=entry == 0, is_last=entry == last)
        if isinstance(stage, WholeStage):
            stage.compute_dtype = DTYPES[plan.precision]
        stage.later = Later() if plan.schedule == "zero_bubble" else None
        yield stage


def cut(
    stage: Stage,
    family: Family,
    spec: ModelSpec,
    grid: Grid,
    compiler: LayerCompiler | None,
    capacity: Capacity | None,
) -> None:
    """Tensor cuts, recompute, compilation, and changes of layout on entry, for every module this stage owns."""
    plan = grid.plan
    degrees, kinds = [strategy.sequence_degree for strategy in plan.strategies()], spec.kind_of_layers()
    if stage.entry_modules:
        _cut_embedding(stage, family, spec, grid)
    places = _place(stage, grid)
    for index in stage.layers:
        strategy = plan.layers[index]
        filling, layer = filling_of(plan, spec, kinds[index]), stage.layer(index)
        tp = grid.axis_group(1, strategy.tp, filling=filling)
        stack = stage.chain[index].stack
        if stage.chain[index].is_idle:
            shrink(layer, kinds[index].parameters, tp)
            layer.requires_grad_(False).forward = partial(pass_on, stack.outputs)
            continue
        regions, experts = regions_in(layer, stack), experts_in(layer, stack)
        if capacity is not None and experts is not None and strategy.ep == 1:
            without_nobody(layer.get_submodule(experts.module), kinds[index].num_experts)
        if stage.later is not None:
            stage.later.taps[layer] = tap_linears(layer, regions, kinds[index], tp)
        cut_layer(layer, regions, kinds[index], tp, experts, grid.experts(strategy))
        if capacity is not None and experts is not None:
            capacity.limit(layer.get_submodule(experts.module), kinds[index], strategy)
        if not stack.windowed:
            drop_alike(layer, grid.axis_group(1, strategy.sequence_degree))
        attend_across(layer, Context(grid.ulysses(strategy, filling), grid.ring(strategy), tp))
        if spec.is_layer_reached(index):  # nothing is kept of other layers, and compilers fail on such a checkpoint
            recompute_in_backward(
                layer,
                regions,
                tp,
                strategy.recompute,
                has_experts=experts is not None,
                needs_output=kinds[index].needs_output,
            )
        if compiler is not None:
            compiler(layer, (kinds[index].name, strategy))
        if stage.later is not None:
            put_off(layer, tp.size, stage.later)
        if not family.asks_for_attention:
            biases = {name for region in regions for name in region.head_inputs}
            told_of_own_rows(layer, biases, kinds[index].num_heads)
        places[strategy].enter(layer, of_side=stage.chain[index].stack.side is not None)
        if isinstance(stage, WholeStage):
            _meet_whole(stage, index, grid, filling)
        else:
            _enter(layer, grid, degrees[index], degrees[index + 1])
    if isinstance(stage, WholeStage):
        _meet_neighbours(stage, spec, grid)
    elif not stage.is_first:
        stage.receive_in(stage.layer(stage.layers.start))
    if stage.is_last:
        if not isinstance(stage, WholeStage):
            _enter(stage.last_modules[0], grid, degrees[-2], degrees[-1])
        _cut_head(stage, family, spec, grid)


def _meet_neighbours(stage: WholeStage, spec: ModelSpec, grid: Grid) -> None:
    plan, kinds = grid.plan, spec.kind_of_layers()

    def whole_of(index: int | None) -> AxisGroup:
        filling = None if index is None else filling_of(plan, spec, kinds[index])
        return grid.axis_group(1, plan.embedding.tp, filling=filling)

    stage.meet_neighbours(whole_of)


def _meet_whole(stage: WholeStage, index: int, grid: Grid, filling: Filling | None) -> None:
    """Changes of layout around a layer whose stack begins and ends with whole sequences."""
    plan, link, layer = grid.plan, stage.chain[index], stage.layer(index)
    own, before = plan.layers[index].sequence_degree, plan.embedding.sequence_degree
    if link.stack.windowed:
        stage.draw_alike(index, grid.axis_group(1, plan.layers[index].tp))
    _enter(layer, grid, before if link.is_first else plan.layers[index - 1].sequence_degree, own, filling)
    if link.is_first:
        stage.enter_from_whole(index, grid.axis_group(1, before, filling=filling))
    if link.stack.side is not None:
        side = stage.side_of(plan.layers[index], grid.axis_group(1, before), _change(grid, before, own))
        side.enter(layer, link.stack.side)
    if link.is_last:
        is_end = index == len(stage.chain) - 1
        after = (plan.head if is_end else plan.embedding).sequence_degree
        change = _change(grid, own, after, filling)
        stage.leave_whole(index, change, grid.axis_group(1, after, filling=filling))


def _change(grid: Grid, previous: int, degree: int, filling: Filling | None = None) -> Callable[[Tensor], Tensor]:
    axes = grid.axis_group(min(previous, degree), max(previous, degree), filling=filling)
    return partial(change_layout, axes=axes, previous=previous, degree=degree)


def _enter(module: nn.Module, grid: Grid, previous: int, degree: int, filling: Filling | None = None) -> None:
    axes = grid.axis_group(min(previous, degree), max(previous, degree), filling=filling)
    enter_with_layout(module, axes, previous, degree)


def _cut_embedding(stage: Stage, family: Family, spec: ModelSpec, grid: Grid) -> None:
    strategy, whole = grid.plan.embedding, family.ends == "whole"
    tp = grid.axis_group(1, strategy.tp)
    tables = stage.tables
    for table in tables:
        cut_embedding(table, spec.embedding.parameters[0], tp, whole=whole)
        table.weight = tables[0].weight
    degree, seq_len = strategy.sequence_degree, grid.plan.seq_len
    own = grid.axes.spans(grid.stage_rank, 1, degree, seq_len, folded=grid.folded)
    for positions in stage.position_tables():
        cut_positions(positions, own)


def _place(stage: Stage, grid: Grid) -> dict[LayerStrategy, OwnPlaces]:
    """Tell ``stage`` which positions it is told of, and by strategy what its layers see of them.

    Where all layers see the same positions, those: rotary tables are as long as what a rank has of a sequence.  Rows
    are those of the layers that have most: degrees nest, and so do rows.  Learnt positions are of embedded tokens.
    """
    whole = (range(grid.plan.seq_len),)
    layers = {grid.plan.layers[index] for index in stage.layers}
    seen, rows = {s: grid.spans(s) for s in layers}, {s: grid.rows(s) for s in layers}
    learnt = bool(stage.position_tables())
    alike = len(set(seen.values())) == 1 and not learnt and stage.family.ends == "tokens"
    stage.position_spans = next(iter(seen.values())) if alike else whole
    stage.position_rows = grid.rows(grid.plan.embedding) if learnt else max(rows.values(), key=len)
    stage.document_rows = set(rows.values())
    return {
        s: OwnPlaces(rows[s], stage.position_rows, None if spans == stage.position_spans else spans, stage.packed)
        for s, spans in seen.items()
    }


def _cut_head(stage: Stage, family: Family, spec: ModelSpec, grid: Grid) -> None:
    tp, projection, head = grid.axis_group(1, grid.plan.head.tp), spec.head.parameters[-1], stage.last_modules[-1]
    stage.head_tp = tp
    if isinstance(stage, WholeStage):
        stage.pairs = grid.axis_group(grid.plan.head.tp, grid.plan.stage_size)
    if family.head is None:
        return
    shrink(stage.model, tuple(stage.placed(p) for p in spec.head.parameters if p.cut is not None), tp)
    if spec.tied_embeddings and stage.entry_modules and stage.tables:
        head.weight = stage.tables[0].weight
    stage.early_gradient.in_every_pass = _adds_up_microbatches(grid.plan)
    fuse_loss(head, projection, tp, stage.early_gradient)


def _adds_up_microbatches(plan: Plan) -> bool:
    """Whether FSDP2 adds the head's gradients up in another place or dtype than a backward brings them in."""
    zero = plan.head.zero
    return (zero >= 2 and plan.head.dp_replicate > 1) or (zero == 1 and plan.precision != plan.grad_reduce_dtype)


def balance_of(config: PretrainedConfig, spec: ModelSpec, grid: Grid, stages: tuple[Stage, ...]) -> Balance | None:
    """What the routers of ``stages`` note from now on, if the model's loss asks for it (``output_router_logits``)."""
    if not getattr(config, "output_router_logits", False):
        return None
    layers = [kind for kind in spec.kind_of_layers() if kind.num_experts]
    plan = grid.plan
    balance = Balance(
        coefficient=config.router_aux_loss_coef / plan.num_microbatches,
        num_experts=layers[0].num_experts,
        rows=len(layers) * plan.micro_batch_size * plan.seq_len,
        top_k=layers[0].experts_per_token,
        device=grid.world.device,
        stage=grid.group(1, plan.stage_size) if plan.stage_size > 1 else None,
    )
    for stage in stages:
        for module in stage.model.modules():
            own: Any = getattr(module, "config", None)
            if module is not stage.model and hasattr(own, "output_router_logits"):
                own.output_router_logits = False  # a copy of the user's; nobody reads the logits
        for index in stage.layers:
            layer = stage.layer(index)
            experts = experts_in(layer, stage.chain[index].stack)
            if experts is not None:
                balance.watch(layer.get_submodule(experts.router))
    return balance


def router_biases(model: PreTrainedModel, family: Family, spec: ModelSpec) -> dict[int, str]:
    """By layer of a whole ``model``, the buffer with a number an expert that its router adds to scores."""
    return {
        index: name
        for index, (link, kind) in enumerate(zip(chain_of(model, family), spec.kind_of_layers(), strict=True))
        if kind.num_experts and experts_in(model.get_submodule(link.path), link.stack) is not None
        for name, value in lasting_buffers(model.get_submodule(link.path)).items()
        if value.shape == (kind.num_experts,)
    }


def loads_of(biases: Mapping[int, str], grid: Grid, stages: tuple[Stage, ...]) -> Loads | None:
    """What the routers of ``stages`` count from now on; ``biases``: ``router_biases`` of all stages; None if none."""
    if not biases:
        return None
    loads = Loads(grid.group(1, grid.plan.stage_size) if grid.plan.stage_size > 1 else None)
    for stage in stages:
        for index in stage.layers:
            layer = stage.layer(index)
            experts = experts_in(layer, stage.chain[index].stack)
            if index in biases and experts is not None:
                loads.watch(layer.get_submodule(experts.router), lasting_buffers(layer)[biases[index]])
    return loads
