"""Which parameters live and are summed together, and the memory that they are given: FSDP2's or flat buffers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from galvatron.core.model import ModelSpec, ParameterSpec
from galvatron.internals import materialise_shards, put_buffer
from galvatron.models import experts_in
from galvatron.plan import LayerStrategy, copied_to
from galvatron.plan.schedules import turns_at_once

from .layers.later import Later, Place
from .pipeline.driver import Chunk
from .pipeline.stage import Stage
from .pipeline.whole import WholeStage
from .processes.grid import Grid
from .sharding.fsdp import (
    DTYPES,
    ShardedUnit,
    mixed_precision,
    prefetch_in_backward,
    prefetch_in_forward,
    reduce_now,
    shard_root,
    shard_unit,
    whole_gradient,
)
from .sharding.unsharded import UnshardedUnit, gradient_slot


@dataclass(frozen=True)
class Unit:
    """Modules whose parameters live, and are summed, together.

    Attributes:
        inner: the unit of some module within these, if it lives apart: experts that are dealt out.
        is_idle: whether they never run; nothing of theirs is gathered then.
    """

    modules: tuple[nn.Module, ...]
    strategy: LayerStrategy
    inner: Unit | None = None
    is_idle: bool = False

    @property
    def apart(self) -> tuple[nn.Module, ...]:
        """The modules within that live apart."""
        return () if self.inner is None else self.inner.modules

    @property
    def both(self) -> tuple[Unit, ...]:
        """This and the inner one, which begins after it in forward and in backward."""
        return (self,) if self.inner is None else (self, self.inner)


def chunk_of(stage: Stage, spec: ModelSpec, grid: Grid) -> Chunk:
    """``stage`` with memory for what this rank holds of its parameters."""
    units = list(units_of(stage, spec, grid))
    sends_back = not stage.is_first and spec.trains_before(stage.layers.start)
    sharded = _shard(stage, units, grid, 0 if sends_back else _first_trained(units))
    every = [unit for outer in units for unit in outer.both]
    _materialise(stage, [unit for unit in every if unit.strategy.zero], grid.world.device)
    unsharded = tuple(_unsharded(unit, grid) for unit in every if not unit.strategy.zero)
    if isinstance(stage, WholeStage):
        stage.bare.place()
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


def _first_trained(units: list[Unit]) -> int:
    """Which unit is the first that has something to train."""
    trained = (any(p.requires_grad for module in unit.modules for p in module.parameters()) for unit in units)
    return next((index for index, trains in enumerate(trained) if trains), 0)


def _shard(stage: Stage, units: list[Unit], grid: Grid, reached: int) -> tuple[ShardedUnit, ...]:
    """Hand the units that are sharded to FSDP2, then the whole stage if there are any.

    The backward goes back to unit ``reached``; what is before it is not gathered then.
    """
    head = stage.last_modules[-1]
    turns = stage.is_last and turns_at_once(grid.plan.schedule, grid.plan.num_microbatches)

    def sharded_of(unit: Unit) -> ShardedUnit:
        return ShardedUnit(unit.modules, unit.strategy, turns=turns and head in unit.modules)

    policy = mixed_precision(grid.plan.precision, grid.plan.grad_reduce_dtype)
    every = [unit for outer in units for unit in outer.both]
    whole = {p for unit in every if not unit.strategy.zero for module in unit.modules for p in module.parameters()}
    inner = [unit.inner for unit in units if unit.inner is not None and unit.inner.strategy.zero]
    for unit in inner:  # first: FSDP2 goes from the inside out.  What comes in is of the dtypes that the layer gives it
        shard_unit(sharded_of(unit), grid.mesh(unit.strategy), replace(policy, cast_forward_inputs=False))
    for unit in units:
        if unit.strategy.zero:
            shard_unit(sharded_of(unit), grid.mesh(unit.strategy), policy, ignored=whole.intersection(_inside(unit)))
    forward, backward = (
        [unit for outer in order if not outer.is_idle for unit in outer.both if unit is outer or unit.strategy.zero]
        for order in (units, units[reached:][::-1])
    )
    for order, prefetch in ((forward, prefetch_in_forward), (backward, prefetch_in_backward)):
        for before, after in itertools.pairwise(order):
            if before.strategy.zero == after.strategy.zero == 3:
                prefetch(sharded_of(before), sharded_of(after))
    sharded = tuple(sharded_of(unit) for unit in forward if unit.strategy.zero)
    if sharded:
        last = next((sharded_of(unit) for unit in reversed(backward) if unit.strategy.zero), sharded[0])
        shard_root(stage, grid.mesh(LayerStrategy(tp=grid.plan.stage_size)), whole.union(stage.elsewhere), last)
    return sharded


def _inside(unit: Unit) -> set[nn.Parameter]:
    return {parameter for module in unit.apart for parameter in module.parameters()}


def _unsharded(unit: Unit, grid: Grid) -> UnshardedUnit:
    dtype, reduce_dtype = DTYPES[grid.plan.precision], DTYPES[grid.plan.grad_reduce_dtype]
    replicas = grid.replicas(unit.strategy)
    return UnshardedUnit(unit.modules, dtype, reduce_dtype, grid.world.device, replicas, apart=unit.apart)


def units_of(stage: Stage, spec: ModelSpec, grid: Grid) -> Iterator[Unit]:
    """The modules whose parameters live, and are summed, together; in forward order.

    What of the embedding runs between stacks is with what runs before the first, if a stage has both.
    """
    plan, embedding = grid.plan, stage.entry_modules
    head = stage.last_modules if stage.is_last else ()
    if embedding and head and spec.tied_embeddings and stage.tables:
        embedding, head = embedding + head, ()
    if embedding and stage.is_first:
        yield Unit(embedding, plan.embedding)
    follows = not stage.is_first and embedding
    for index in stage.layers:
        yield _layer_unit(stage, index, spec, grid)
        if follows and stage.is_joint(index):
            yield Unit(embedding, plan.embedding)
            follows = ()
    if head:
        yield Unit(head, plan.head)
    if isinstance(stage, WholeStage) and list(stage.bare.parameters()):
        yield Unit((stage.bare,), plan.head.replicated)
    for index, user, parameter in copied_to(spec, stage.layers):
        yield Unit((_owner(stage.layer(index), parameter),), plan.layers[user].replicated)


def _layer_unit(stage: Stage, index: int, spec: ModelSpec, grid: Grid) -> Unit:
    """A layer; experts that are dealt out and tables that other stages have too live apart from it."""
    layer, strategy = stage.layer(index), grid.plan.layers[index]
    if stage.chain[index].is_idle:  # what its forward passes on goes by FSDP2, which would gather it
        return Unit(tuple(layer.children()), strategy, is_idle=True)
    experts = experts_in(layer, stage.chain[index].stack) if strategy.ep > 1 else None
    if experts is not None:
        return Unit((layer,), strategy, Unit((layer.get_submodule(experts.module),), strategy.of_experts))
    parameters = spec.kind_of_layers()[index].parameters
    tables = tuple(_owner(layer, p) for p in parameters if len(grid.copies_of(index, p.name)) > 1)
    return Unit((layer,), strategy, Unit(tables, strategy.replicated) if tables and strategy.zero else None)


def _owner(layer: nn.Module, parameter: ParameterSpec) -> nn.Module:
    return layer.get_submodule(parameter.name.rpartition(".")[0])


def _materialise(stage: Stage, sharded: list[Unit], device: torch.device) -> None:
    """Give the shards memory on ``device``; buffers keep their values and move there."""
    buffers = [(module, name, b) for module in stage.modules() for name, b in module.named_buffers(recurse=False)]
    for unit in sharded:
        for module in unit.modules:
            materialise_shards(module, device)
    for module, name, buffer in buffers:
        put_buffer(module, name, buffer.to(device))
