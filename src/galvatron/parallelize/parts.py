"""Every parameter of a rank as a piece of the model's: its name, where it is, who else has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import DTensor

from galvatron.core.model import ModelSpec, ParameterSpec
from galvatron.models import lasting_buffers
from galvatron.plan import LayerStrategy, copied_to

from .accumulation import Replicated
from .pipeline.stage import Stage
from .processes.grid import Grid
from .sharding.unsharded import UnshardedUnit
from .state.pieces import LocalParameter, Piece, pieces_of


@dataclass(frozen=True)
class Part:
    """A parameter of this stage: its global name, spec, unit, owner, strategy, and the stages that hold it."""

    name: str
    unit: str
    spec: ParameterSpec
    module: nn.Module
    attribute: str
    strategy: LayerStrategy
    stages: tuple[int, ...]

    @property
    def layout(self) -> LayerStrategy:
        """Which ranks hold others of it, and how ZeRO shards it."""
        return self.strategy.of_experts if self.spec.experts else self.strategy


def parts_of(stage: Stage, spec: ModelSpec, grid: Grid) -> list[Part]:
    """Every parameter this stage owns, once; a tied head beside the embedding's table is that table."""
    plan = grid.plan
    table, embedding = spec.embedding.parameters[:1], spec.embedding_within(stage.layers)
    parts = [_part(stage, p.name, "embedding", stage.placed(p).name, p, plan.embedding, grid) for p in embedding]
    for index in stage.layers:
        parts += _layer_parts(stage, index, spec, grid)
    for index, user, p in copied_to(spec, stage.layers):
        parts.append(_layer_part(stage, index, p, plan.layers[user].replicated, grid))
    if stage.is_last:
        *others, last = spec.head.parameters
        named = [(p, p.name) for p in others]
        if not spec.tied_embeddings:
            named.append((last, last.name))
        for p, name in named:
            strategy = plan.head.replicated if p.name in stage.family.loose else plan.head
            parts.append(_part(stage, name, "head", stage.placed(p).name, p, strategy, grid))
        if spec.tied_embeddings and table[0] not in embedding:
            parts.append(_part(stage, table[0].name, "head", last.name, last, plan.head, grid))
    return parts


def _layer_parts(stage: Stage, index: int, spec: ModelSpec, grid: Grid) -> Iterator[Part]:
    strategy = grid.plan.layers[index]
    for p in spec.kind_of_layers()[index].parameters:
        is_copied = len(grid.copies_of(index, p.name)) > 1
        yield _layer_part(stage, index, p, strategy.replicated if is_copied else strategy, grid)


def _layer_part(stage: Stage, index: int, parameter: ParameterSpec, strategy: LayerStrategy, grid: Grid) -> Part:
    layer = stage.chain[index].path
    name, stages = f"{layer}.{parameter.name}", grid.copies_of(index, parameter.name)
    return _part(stage, name, layer, name, parameter, strategy, grid, stages)


def _part(
    stage: Stage,
    name: str,
    unit: str,
    path: str,
    parameter: ParameterSpec,
    strategy: LayerStrategy,
    grid: Grid,
    stages: tuple[int, ...] | None = None,
) -> Part:
    owner, _, attribute = path.rpartition(".")
    stages = stages or grid.copies_of(None, name)
    return Part(name, unit, parameter, stage.model.get_submodule(owner), attribute, strategy, stages)


def held_of(part: Part, unsharded: list[UnshardedUnit]) -> nn.Parameter:
    """What this rank holds of a parameter, in float32: what an optimizer updates."""
    own = getattr(part.module, part.attribute)
    if isinstance(own, DTensor):
        return nn.Parameter(own.to_local().detach(), requires_grad=own.requires_grad)
    return next(unit.local(own) for unit in unsharded if unit.holds(own))


def local_parameter(part: Part, held: nn.Parameter, grid: Grid) -> LocalParameter:
    """``part`` with what this rank holds of it, and on how many ranks that is."""
    strategy, layout, tp_rank = part.strategy, part.layout, grid.stage_rank % part.strategy.tp
    whole = part.spec.cut is None or part.spec.cut.is_whole(strategy.tp)
    copies = layout.num_devices // (layout.tp * layout.shard_degree)
    dealt = (strategy.ep, grid.expert_rank(strategy)) if part.spec.experts else (1, 0)
    return LocalParameter(
        name=part.name,
        tensor=held,
        global_shape=part.spec.shape,
        pieces=pieces_of(part.spec, strategy.tp, tp_rank, layout.shard_degree, grid.shard_rank(layout), *dealt),
        replicas=copies * (strategy.tp if whole else 1) * len(part.stages),
        is_primary=grid.replica_rank(layout) == 0 and not (whole and tp_rank) and grid.stage == part.stages[0],
        travels_with=part.unit if strategy.offload == "optimizer" else None,
    )


def lasting_of(stage: Stage, grid: Grid) -> list[LocalParameter]:
    """Buffers of a stage's layers that files have too: every rank of the stage has them whole, and none trains them."""
    found = []
    for index in stage.layers:
        for name, value in lasting_buffers(stage.layer(index)).items():
            whole = Piece((0,) * value.dim(), (0,) * value.dim(), tuple(value.shape))
            found.append(
                LocalParameter(
                    name=f"{stage.chain[index].path}.{name}",
                    tensor=nn.Parameter(value, requires_grad=False),
                    global_shape=tuple(value.shape),
                    pieces=(whole,),
                    replicas=grid.plan.stage_size,
                    is_primary=grid.stage_rank == 0,
                )
            )
    return found


def replicated_of(parts: list[Part], parameters: list[LocalParameter], grid: Grid) -> tuple[Replicated, ...]:
    """Trainable parameters that several tp ranks hold, or runs of them, by how many do; then what several stages do."""
    by_copies: dict[int, tuple[list[LocalParameter], list[LocalParameter]]] = {}
    by_stages: dict[tuple[int, ...], list[LocalParameter]] = {}
    for part, parameter in zip(parts, parameters, strict=True):
        tp = part.strategy.tp
        if not part.spec.trainable:
            continue
        is_cut = part.spec.cut is not None and not part.spec.cut.is_whole(tp)
        for copies in set(part.spec.copies(tp)) - {1}:
            by_copies.setdefault(copies, ([], []))[is_cut].append(parameter)
        if len(part.stages) > 1:
            by_stages.setdefault(part.stages, []).append(parameter)
    within = [Replicated(grid.group(1, copies), *map(tuple, by_copies[copies])) for copies in sorted(by_copies)]
    # stages have them in orders of their own
    across = {at: tuple(sorted(own, key=lambda parameter: parameter.name)) for at, own in sorted(by_stages.items())}
    return (*within, *(Replicated(grid.group_of_copies(at), own) for at, own in across.items()))
