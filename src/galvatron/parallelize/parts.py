"""Every parameter of a rank as a piece of the model's: its name, where it is, who else has it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import DTensor

from galvatron.core.model import ModelSpec, ParameterSpec
from galvatron.plan import LayerStrategy

from .accumulation import Replicated
from .pipeline.stage import Stage
from .processes.grid import Grid
from .sharding.unsharded import UnshardedUnit
from .state.pieces import LocalParameter, pieces_of


@dataclass(frozen=True)
class Part:
    """A parameter of this stage: its global name, spec, unit, owner and strategy."""

    name: str
    unit: str
    spec: ParameterSpec
    module: nn.Module
    attribute: str
    strategy: LayerStrategy

    @property
    def layout(self) -> LayerStrategy:
        """Which ranks hold others of it, and how ZeRO shards it."""
        return self.strategy.of_experts if self.spec.experts else self.strategy


def parts_of(stage: Stage, spec: ModelSpec, grid: Grid) -> list[Part]:
    """Every parameter this stage owns, once; a tied head on the embedding's stage is the embedding."""
    plan, kinds = grid.plan, spec.kind_of_layers()
    named: list[tuple[str, str, str, ParameterSpec, LayerStrategy]] = []
    if stage.is_first:
        named += [(p.name, "embedding", stage.placed(p).name, p, plan.embedding) for p in spec.embedding.parameters]
    for index in stage.layers:
        layer, strategy = stage.chain[index].path, plan.layers[index]
        named += [(f"{layer}.{p.name}", layer, f"{layer}.{p.name}", p, strategy) for p in kinds[index].parameters]
    if stage.is_last:
        *others, last = spec.head.parameters
        bare = set(stage.family.bare)
        for p in others:
            strategy = plan.head.replicated if p.name in bare else plan.head
            named.append((p.name, "head", stage.placed(p).name, p, strategy))
        if not spec.tied_embeddings:
            strategy = plan.head.replicated if last.name in bare else plan.head
            named.append((last.name, "head", stage.placed(last).name, last, strategy))
        elif not stage.is_first:
            named.append((spec.embedding.parameters[0].name, "head", last.name, last, plan.head))
    parts = []
    for name, unit, path, parameter, strategy in named:
        owner, _, attribute = path.rpartition(".")
        parts.append(Part(name, unit, parameter, stage.model.get_submodule(owner), attribute, strategy))
    return parts


def held_of(part: Part, unsharded: list[UnshardedUnit]) -> nn.Parameter:
    """What this rank holds of a parameter, in float32: what an optimizer updates."""
    own = getattr(part.module, part.attribute)
    if isinstance(own, DTensor):
        return nn.Parameter(own.to_local().detach(), requires_grad=own.requires_grad)
    return next(unit.local(own) for unit in unsharded if unit.holds(own))


def local_parameter(part: Part, held: nn.Parameter, spec: ModelSpec, grid: Grid) -> LocalParameter:
    """``part`` with what this rank holds of it, and on how many ranks that is."""
    strategy, layout, tp_rank = part.strategy, part.layout, grid.stage_rank % part.strategy.tp
    whole = part.spec.cut is None or part.spec.cut.is_whole(strategy.tp)
    twice, copies = _is_tied_copy(part, spec, grid), layout.num_devices // (layout.tp * layout.shard_degree)
    dealt = (strategy.ep, grid.expert_rank(strategy)) if part.spec.experts else (1, 0)
    return LocalParameter(
        name=part.name,
        tensor=held,
        global_shape=part.spec.shape,
        pieces=pieces_of(part.spec, strategy.tp, tp_rank, layout.shard_degree, grid.shard_rank(layout), *dealt),
        replicas=copies * (strategy.tp if whole else 1) * (2 if twice else 1),
        is_primary=grid.replica_rank(layout) == 0 and not (whole and tp_rank) and not (twice and grid.stage),
        travels_with=part.unit if strategy.offload == "optimizer" else None,
    )


def _is_tied_copy(part: Part, spec: ModelSpec, grid: Grid) -> bool:
    """Whether first and last stage both hold this parameter."""
    return spec.tied_embeddings and grid.plan.pp > 1 and part.name == spec.embedding.parameters[0].name


def replicated_of(
    parts: list[Part], parameters: list[LocalParameter], spec: ModelSpec, grid: Grid
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
