"""``parallelize``: every technique applied to a model, in one fixed order.

tensor cuts → attention → recompute → compile → redistribution → data parallel (FSDP2 where something is sharded) →
weights.  Until the last step all parameters are on meta, so no rank ever holds more than its own part.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from galvatron.core.errors import ConfigError, PlanError
from galvatron.core.model import ModelSpec, ParameterSpec
from galvatron.internals import put_buffer
from galvatron.models import Family, InitialWeights, family_of, spec_of
from galvatron.plan import LayerStrategy, Plan, check_runnable, folds_sequence
from galvatron.plan.schedules import turns_at_once

from .checks.agreement import check_agreement
from .checks.model import check_model
from .checks.surroundings import check_surroundings
from .layers.attention import Context, attend_across, use_attention
from .layers.compile import LayerCompiler, compiles
from .layers.forward import OwnPositions, enter_with_layout
from .layers.fp8 import check_fp8, fp8_problem, use_fp8
from .layers.later import Later, Place, put_off
from .layers.recompute import recompute_in_backward
from .layers.tensor_parallel import cut_embedding, cut_layer, cut_positions, shrink, tap_linears
from .losses.fused import fuse_loss
from .model import ParallelModel, Replicated
from .pipeline.driver import Chunk
from .pipeline.stage import Stage
from .processes.grid import Grid
from .processes.ranks import together
from .processes.world import World, init_world
from .proof import refuse_unproved
from .sharding.fsdp import (
    DTYPES,
    ShardedUnit,
    mixed_precision,
    prefetch,
    reduce_now,
    shard_root,
    shard_unit,
    whole_gradient,
)
from .sharding.unsharded import UnshardedUnit, gradient_slot
from .state.pieces import LocalParameter, pieces_of
from .state.weights import GivenWeights, StateDictWeights, Weights, check_names, fill

_Unit = tuple[tuple[nn.Module, ...], LayerStrategy]


@dataclass(frozen=True)
class _Part:
    """A parameter of this stage: its global name, spec, owner and strategy."""

    name: str
    spec: ParameterSpec
    module: nn.Module
    attribute: str
    strategy: LayerStrategy


def parallelize(
    model: PreTrainedModel,
    plan: Plan,
    *,
    world: World | None = None,
    weights: GivenWeights | None = None,
    seed: int = 0,
    compile: bool | None = None,
    fp8: bool = False,
) -> ParallelModel:
    """Run ``model`` under ``plan`` on this process's part of the world.  Collective over the world.

    Args:
        model: an unmodified Hugging Face causal language model.  It is consumed: its modules become this rank's
            stage (``model.config`` stays as it is).  Parameters may be real or on meta
            (``galvatron.models.meta_model``); those that do not require a gradient stay as they are.
        plan: which must fit the model and the world.
        world: from ``init_world``; made if absent.
        weights: where values come from; by default the model's own if it has any, else ``seed``.
        seed: for initial weights of a meta model, which depend on it and on names, never on the plan; and for
            dropout, whose masks depend on it, the step and the rank, never on what else draws random numbers.
        compile: whether layers are compiled (``torch.compile``); by default on CUDA alone.  What is compiled is
            compiled in the first step and the first evaluation, or by ``warm_up``.
        fp8: whether products of layers are made in float8, under a plan in bf16.

    Raises:
        PlanError: the plan breaks a rule of the model or of the world, or of float8 products.
        ConfigError: the model's family has no record, the device or the model has no float8 products, or the model
            is not what its config describes, or ranks were given different plans, models, seeds or weights; the
            model is left as it was.
        CheckpointError: ``weights`` are not those of the model, quantised or not finite.
    """
    if isinstance(model, ParallelModel):
        raise ConfigError("this model is parallel already; give parallelize a new one")
    check_model(model)
    if not isinstance(plan, Plan):
        raise PlanError(f"parallelize takes a Plan, got {type(plan).__name__}; load a file with Plan.load(path)")
    world = world or init_world()
    check_surroundings(world.device, gradients=False)
    check_agreement(model, plan, seed, own_weights=weights is None)
    family, spec = family_of(model.config), spec_of(model)
    plan.validate(spec, world.world_size)
    check_runnable(plan)
    if fp8:
        _check_fp8(model, plan, family, spec, world)
    refuse_unproved(model.config, uses_tp=any(strategy.tp > 1 for strategy in plan.layers))
    twins: dict[str, str] = {}  # a tied head that given weights have a copy of
    if weights is not None:
        tied = {spec.embedding.parameters[0].name: spec.head.parameters[-1].name} if spec.tied_embeddings else {}
        twins = check_names(weights, model, tied)
    values = weights or _own_weights(model, seed)
    grid = Grid(plan, world, tied=spec.tied_embeddings, folded=folds_sequence(plan, spec))
    use_attention(model)
    _to_meta(model)
    if fp8:
        use_fp8(model.get_submodule(family.layers))
    stages = tuple(_stages(model, family, grid))
    compiled = compiles(compile, world.device, spec)
    compiler = LayerCompiler() if compiled else None
    for stage in stages:
        _cut(stage, family, spec, grid, compiler)
    parts = [part for stage in stages for part in _parts(stage, family, spec, grid)]
    chunks = tuple(_chunk(stage, list(_units(stage, family, spec, grid)), grid) for stage in stages)
    unsharded = [unit for chunk in chunks for unit in chunk.unsharded]
    parameters = [_local_parameter(part, _held(part, unsharded), spec, grid) for part in parts]
    together(lambda: fill(parameters, values, twins))
    for stage in stages:
        stage.train()
    shards = {part.name: getattr(part.module, part.attribute) for part in parts if part.strategy.zero}
    replicated = _replicated(parts, parameters, spec, grid)
    return ParallelModel(
        grid,
        spec,
        model.config,
        chunks,
        shards,
        parameters,
        replicated,
        seed,
        compiled=compiled,
    )


def _check_fp8(model: PreTrainedModel, plan: Plan, family: Family, spec: ModelSpec, world: World) -> None:
    check_fp8(model, family, world.device, plan.precision)
    if plan.schedule == "zero_bubble":
        raise PlanError(
            "fp8 products have no backward in two passes, as schedule=zero_bubble has them; choose another schedule"
        )
    for kind, strategy in dict.fromkeys(zip(spec.kind_of_layers(), plan.layers, strict=True)):
        problem = fp8_problem(kind, strategy.tp, plan.seq_len // (strategy.ulysses * strategy.cp))
        if problem:
            raise PlanError(problem)


def _own_weights(model: PreTrainedModel, seed: int) -> Weights:
    on_meta = {parameter.is_meta for parameter in model.parameters()}
    if on_meta == {True, False}:
        raise ConfigError("a model's parameters must be all real or all on meta; load it without a device_map")
    if on_meta == {True}:
        return InitialWeights(model, seed)
    return StateDictWeights(dict(model.named_parameters()))


def _to_meta(model: PreTrainedModel) -> None:
    """Let go of parameter values (a weights source may still hold them); ties stay ties."""
    metas: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in metas:
                value = parameter.detach().to(device="meta", dtype=torch.float32)
                metas[parameter] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            setattr(module, name, metas[parameter])


def _stages(model: PreTrainedModel, family: Family, grid: Grid) -> Iterator[Stage]:
    """This rank's model chunks in forward order, each in a skeleton (on meta) of its own."""
    plan, last = grid.plan, len(grid.plan.layers_per_stage) - 1
    skeletons = [model, *(copy.deepcopy(model) for _ in range(plan.model_chunks - 1))]
    for chunk, skeleton in enumerate(skeletons):
        entry = chunk * plan.pp + grid.stage
        layers = plan.chunk_layers(grid.stage, chunk)
        stage = Stage(skeleton, family, layers, is_first=entry == 0, is_last=entry == last)
        stage.later = Later() if plan.schedule == "zero_bubble" else None
        yield stage


def _cut(stage: Stage, family: Family, spec: ModelSpec, grid: Grid, compiler: LayerCompiler | None) -> None:
    """Tensor cuts, recompute, compilation, and changes of layout on entry, for every module this stage owns."""
    plan = grid.plan
    degrees, kinds = [strategy.sequence_degree for strategy in plan.strategies()], spec.kind_of_layers()
    chain = stage.model.get_submodule(family.layers)
    assert isinstance(chain, nn.ModuleList)
    contexts = {strategy: Context(grid.ulysses(strategy), grid.ring(strategy)) for strategy in set(plan.layers)}
    if stage.is_first:
        _cut_embedding(stage, family, spec, grid)
    own_positions = _place_positions(stage, family, grid)
    for index in stage.layers:
        strategy = plan.layers[index]
        tp = grid.axis_group(1, strategy.tp)
        if stage.later is not None:
            stage.later.taps[chain[index]] = tap_linears(chain[index], family, kinds[index], tp)
        cut_layer(chain[index], family, kinds[index], tp)
        attend_across(chain[index], contexts[strategy])
        if spec.trains_before(index + 1):  # nothing is kept of other layers, and compilers fail on such a checkpoint
            recompute_in_backward(chain[index], family, tp, strategy.recompute)
        if compiler is not None:
            compiler(chain[index], (kinds[index].name, strategy))
        if stage.later is not None:
            put_off(chain[index], tp.size, stage.later)
        if strategy in own_positions:
            own_positions[strategy].enter(chain[index])
        _enter(chain[index], grid, degrees[index], degrees[index + 1])
    if not stage.is_first:
        stage.receive_in(chain[stage.layers.start])
    if stage.is_last:
        _enter(stage.model.get_submodule(family.norm), grid, degrees[-2], degrees[-1])
        _cut_head(stage, family, spec, grid)


def _enter(module: nn.Module, grid: Grid, previous: int, degree: int) -> None:
    axes = grid.axis_group(min(previous, degree), max(previous, degree))
    enter_with_layout(module, axes, previous, degree)


def _cut_embedding(stage: Stage, family: Family, spec: ModelSpec, grid: Grid) -> None:
    strategy = grid.plan.embedding
    tp = grid.axis_group(1, strategy.tp)
    cut_embedding(stage.model.get_submodule(family.embedding), spec.embedding.parameters[0], tp)
    degree, seq_len = strategy.sequence_degree, grid.plan.seq_len
    own = grid.axes.spans(grid.stage_rank, 1, degree, seq_len, folded=grid.folded)
    for positions in stage.position_tables():
        cut_positions(positions, own)


def _place_positions(stage: Stage, family: Family, grid: Grid) -> dict[LayerStrategy, OwnPositions]:
    """Tell ``stage`` which positions it is told of; the strategies whose layers see others see them by what is given.

    Where all layers see the same ones, those: rotary tables are as long as what a rank has of a sequence.
    """
    whole = (range(grid.plan.seq_len),)
    layers = {grid.plan.layers[index] for index in stage.layers}
    seen = {strategy: grid.spans(strategy) for strategy in layers}
    alike = len(set(seen.values())) == 1 and not stage.position_tables()
    stage.position_spans = next(iter(seen.values())) if alike else whole
    device = grid.world.device
    return {strategy: OwnPositions(spans, device) for strategy, spans in seen.items() if spans != stage.position_spans}


def _cut_head(stage: Stage, family: Family, spec: ModelSpec, grid: Grid) -> None:
    tp, projection = grid.axis_group(1, grid.plan.head.tp), spec.head.parameters[-1]
    head = stage.model.get_submodule(family.head)
    shrink(stage.model, tuple(p for p in spec.head.parameters if p.cut is not None), tp)
    if spec.tied_embeddings and stage.is_first:
        head.weight = stage.model.get_submodule(family.embedding).weight
    stage.head_tp = tp
    stage.early_gradient.in_every_pass = _adds_up_microbatches(grid.plan)
    fuse_loss(head, projection, tp, stage.early_gradient)


def _adds_up_microbatches(plan: Plan) -> bool:
    """Whether FSDP2 adds the head's gradients up in another place or dtype than a backward brings them in."""
    zero = plan.head.zero
    return (zero >= 2 and plan.head.dp_replicate > 1) or (zero == 1 and plan.precision != plan.grad_reduce_dtype)


def _chunk(stage: Stage, units: list[_Unit], grid: Grid) -> Chunk:
    """``stage`` with memory for what this rank holds of its parameters."""
    sharded = _shard(stage, units, grid)
    _materialise(stage, sharded, grid.world.device)
    unsharded = tuple(_unsharded(modules, strategy, grid) for modules, strategy in units if not strategy.zero)
    return Chunk(stage, sharded, unsharded, () if stage.later is None else _place(stage.later, sharded))


def _place(later: Later, sharded: tuple[ShardedUnit, ...]) -> tuple[ShardedUnit, ...]:
    """Say where the gradients of weight passes go; the units of those that FSDP2 reduces."""
    units = {module: unit for unit in sharded for module in unit.modules}
    waiting = {layer: units[layer] for layer, taps in later.taps.items() if taps and layer in units}
    for layer, taps in later.taps.items():
        for linear in (tap.linear for tap in taps):
            slot = gradient_slot(linear.weight)  # type: ignore[arg-type]
            if slot is not None:
                later.places[linear] = Place(slot.accumulator, slot.arrived)
            else:
                later.places[linear] = Place(whole_gradient(waiting[layer], linear, "weight"))
    for layer, unit in waiting.items():
        if unit.strategy.zero >= 2:
            later.finished[layer] = partial(reduce_now, unit)
    return tuple(waiting.values())


def _shard(stage: Stage, units: list[_Unit], grid: Grid) -> tuple[ShardedUnit, ...]:
    """Hand the units that are sharded to FSDP2, then the whole stage if there are any."""
    head = stage.model.get_submodule(stage.family.head)
    turns = stage.is_last and turns_at_once(grid.plan.schedule, grid.plan.num_microbatches)
    sharded = tuple(
        ShardedUnit(modules, strategy, turns=turns and head in modules) for modules, strategy in units if strategy.zero
    )
    policy = mixed_precision(grid.plan.precision, grid.plan.grad_reduce_dtype)
    for unit in sharded:
        shard_unit(unit, grid.mesh(unit.strategy), policy)
    for before, after in itertools.pairwise(units):
        if before[1].zero == after[1].zero == 3:
            prefetch(ShardedUnit(*before), ShardedUnit(*after))
    if sharded:
        whole = [p for modules, strategy in units if not strategy.zero for m in modules for p in m.parameters()]
        shard_root(stage, grid.mesh(LayerStrategy(tp=grid.plan.stage_size)), whole, sharded[0])
    return sharded


def _unsharded(modules: tuple[nn.Module, ...], strategy: LayerStrategy, grid: Grid) -> UnshardedUnit:
    dtype, reduce_dtype = DTYPES[grid.plan.precision], DTYPES[grid.plan.grad_reduce_dtype]
    return UnshardedUnit(modules, dtype, reduce_dtype, grid.world.device, grid.replicas(strategy))


def _held(part: _Part, unsharded: list[UnshardedUnit]) -> nn.Parameter:
    """What this rank holds of a parameter, in float32: what an optimizer updates."""
    own = getattr(part.module, part.attribute)
    if isinstance(own, DTensor):
        return nn.Parameter(own.to_local().detach(), requires_grad=own.requires_grad)
    return next(unit.local(own) for unit in unsharded if unit.holds(own))


def _units(stage: Stage, family: Family, spec: ModelSpec, grid: Grid) -> Iterator[_Unit]:
    """The modules whose parameters live, and are summed, together; in forward order."""
    plan = grid.plan
    names = (family.embedding, *family.before) if stage.is_first else ()
    embedding = tuple(map(stage.model.get_submodule, names))
    head: tuple[nn.Module, ...] = ()
    if stage.is_last:
        head = (stage.model.get_submodule(family.norm), stage.model.get_submodule(family.head))
    if embedding and head and spec.tied_embeddings:
        embedding, head = embedding + head, ()
    if embedding:
        yield embedding, plan.embedding
    for index in stage.layers:
        yield (stage.model.get_submodule(f"{family.layers}.{index}"),), plan.layers[index]
    if head:
        yield head, plan.head


def _parts(stage: Stage, family: Family, spec: ModelSpec, grid: Grid) -> list[_Part]:
    """Every parameter this stage owns, once; a tied head on the embedding's stage is the embedding."""
    plan, kinds = grid.plan, spec.kind_of_layers()
    named: list[tuple[str, str, ParameterSpec, LayerStrategy]] = []
    if stage.is_first:
        named += [(p.name, p.name, p, plan.embedding) for p in spec.embedding.parameters]
    for index in stage.layers:
        prefix = f"{family.layers}.{index}."
        named += [(prefix + p.name, prefix + p.name, p, plan.layers[index]) for p in kinds[index].parameters]
    if stage.is_last:
        *norm, projection = spec.head.parameters
        named += [(p.name, p.name, p, plan.head) for p in norm]
        if not spec.tied_embeddings:
            named.append((projection.name, projection.name, projection, plan.head))
        elif not stage.is_first:
            named.append((spec.embedding.parameters[0].name, projection.name, projection, plan.head))
    parts = []
    for name, path, parameter, strategy in named:
        owner, _, attribute = path.rpartition(".")
        parts.append(_Part(name, parameter, stage.model.get_submodule(owner), attribute, strategy))
    return parts


def _materialise(stage: Stage, sharded: tuple[ShardedUnit, ...], device: torch.device) -> None:
    """Give the shards memory on ``device``; buffers keep their values and move there."""
    buffers = [(module, name, b) for module in stage.modules() for name, b in module.named_buffers(recurse=False)]
    for unit in sharded:
        for module in unit.modules:
            module.to_empty(device=device)
    for module, name, buffer in buffers:
        put_buffer(module, name, buffer.to(device))


def _local_parameter(part: _Part, held: nn.Parameter, spec: ModelSpec, grid: Grid) -> LocalParameter:
    strategy, tp_rank = part.strategy, grid.stage_rank % part.strategy.tp
    whole = part.spec.cut is None or part.spec.cut.is_whole(strategy.tp)
    twice, copies = _is_tied_copy(part, spec, grid), strategy.num_devices // (strategy.tp * strategy.shard_degree)
    return LocalParameter(
        name=part.name,
        tensor=held,
        global_shape=part.spec.shape,
        pieces=pieces_of(part.spec, strategy.tp, tp_rank, strategy.shard_degree, grid.shard_rank(strategy)),
        replicas=copies * (strategy.tp if whole else 1) * (2 if twice else 1),
        is_primary=grid.replica_rank(strategy) == 0 and not (whole and tp_rank) and not (twice and grid.stage),
    )


def _is_tied_copy(part: _Part, spec: ModelSpec, grid: Grid) -> bool:
    """Whether first and last stage both hold this parameter."""
    return spec.tied_embeddings and grid.plan.pp > 1 and part.name == spec.embedding.parameters[0].name


def _replicated(
    parts: list[_Part], parameters: list[LocalParameter], spec: ModelSpec, grid: Grid
) -> tuple[Replicated, ...]:
    """Trainable parameters whole on several tp ranks, by tp degree, then the tied embedding's two copies."""
    by_tp: dict[int, list[LocalParameter]] = {}
    pairs = [pair for pair in zip(parts, parameters, strict=True) if pair[0].spec.trainable]
    for part, parameter in pairs:
        tp = part.strategy.tp
        if tp > 1 and (part.spec.cut is None or part.spec.cut.is_whole(tp)):
            by_tp.setdefault(tp, []).append(parameter)
    result = [Replicated(grid.group(1, tp), tuple(by_tp[tp])) for tp in sorted(by_tp)]
    tied = tuple(parameter for part, parameter in pairs if _is_tied_copy(part, spec, grid))
    if tied and grid.tied_group is not None:
        result.append(Replicated(grid.tied_group, tied))
    return tuple(result)
