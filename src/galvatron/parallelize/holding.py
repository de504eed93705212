"""Which parameters live and are summed together, and the memory that they are given: FSDP2's or flat buffers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from galvatron.core.model import ModelSpec
from galvatron.internals import put_buffer
from galvatron.plan import LayerStrategy
from galvatron.plan.schedules import turns_at_once

from .layers.later import Later, Place
from .pipeline.driver import Chunk
from .pipeline.stage import Stage
from .processes.grid import Grid
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

Unit = tuple[tuple[nn.Module, ...], LayerStrategy]
"""Modules whose parameters live, and are summed, together."""


def chunk_of(stage: Stage, units: list[Unit], grid: Grid) -> Chunk:
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


def _shard(stage: Stage, units: list[Unit], grid: Grid) -> tuple[ShardedUnit, ...]:
    """Hand the units that are sharded to FSDP2, then the whole stage if there are any."""
    head = stage.last_modules[-1]
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
        shard_root(stage, grid.mesh(LayerStrategy(tp=grid.plan.stage_size)), whole + stage.elsewhere, sharded[0])
    return sharded


def _unsharded(modules: tuple[nn.Module, ...], strategy: LayerStrategy, grid: Grid) -> UnshardedUnit:
    dtype, reduce_dtype = DTYPES[grid.plan.precision], DTYPES[grid.plan.grad_reduce_dtype]
    return UnshardedUnit(modules, dtype, reduce_dtype, grid.world.device, grid.replicas(strategy))


def units_of(stage: Stage, spec: ModelSpec, grid: Grid) -> Iterator[Unit]:
    """The modules whose parameters live, and are summed, together; in forward order."""
    plan = grid.plan
    embedding = stage.first_modules if stage.is_first else ()
    head = stage.last_modules if stage.is_last else ()
    if embedding and head and spec.tied_embeddings:
        embedding, head = embedding + head, ()
    if embedding:
        yield embedding, plan.embedding
    for index in stage.layers:
        yield (stage.layer(index),), plan.layers[index]
    if head:
        yield head, plan.head


def _materialise(stage: Stage, sharded: tuple[ShardedUnit, ...], device: torch.device) -> None:
    """Give the shards memory on ``device``; buffers keep their values and move there."""
    buffers = [(module, name, b) for module in stage.modules() for name, b in module.named_buffers(recurse=False)]
    for unit in sharded:
        for module in unit.modules:
            module.to_empty(device=device)
    for module, name, buffer in buffers:
        put_buffer(module, name, buffer.to(device))
