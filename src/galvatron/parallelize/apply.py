"""``parallelize``: every technique applied to a model, in one fixed order.

tensor cuts → attention → recompute → compile → redistribution → data parallel (FSDP2 where something is sharded) →
weights.  Until the last step all parameters are on meta, so no rank ever holds more than its own part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from galvatron.core.errors import ConfigError, PlanError
from galvatron.core.model import ModelSpec
from galvatron.models import Adapter, Family, InitialWeights, adapter_of, chain_of, config_of, family_of, spec_of
from galvatron.models.lora import wrapped
from galvatron.plan import Plan, check_runnable, copies, folds_sequence

from .checks.agreement import check_agreement
from .checks.model import check_model
from .checks.surroundings import check_surroundings
from .cutting import balance_of, cut, loads_of, router_biases, stages_of
from .holding import chunk_of
from .layers.attention import use_attention
from .layers.capacity import Capacity, check_capacity
from .layers.compile import LayerCompiler, compiles
from .layers.fp8 import check_fp8, fp8_problem, use_fp8
from .model import ParallelModel
from .parts import held_of, lasting_of, local_parameter, parts_of, replicated_of
from .pipeline.stage import Stage
from .pipeline.whole import WholeStage
from .processes.grid import Grid
from .processes.ranks import together
from .processes.world import World, init_world
from .proof import refuse_unproved
from .state.weights import CompletedWeights, GivenWeights, StateDictWeights, Weights, check_names, fill


def parallelize(
    model: PreTrainedModel | nn.Module,
    plan: Plan,
    *,
    world: World | None = None,
    weights: GivenWeights | None = None,
    seed: int = 0,
    compile: bool | None = None,
    fp8: bool = False,
    capacity_factor: float | None = None,
) -> ParallelModel:
    """Run ``model`` under ``plan`` on this process's part of the world.  Collective over the world.

    Args:
        model: an unmodified Hugging Face causal language model, or one with a LoRA adapter by peft (``add_adapter`` or
            ``get_peft_model``).  It is consumed: its modules become this rank's stage (``model.config`` stays as it
            is).  Parameters may be real or on meta (``galvatron.models.meta_model``); those that do not require a
            gradient stay as they are.
        plan: which must fit the model and the world.
        world: from ``init_world``; made if absent.
        weights: where values come from; by default the model's own if it has any, else ``seed``.  Adapters that they
            lack come from there too.
        seed: for initial weights of a meta model, which depend on it and on names, never on the plan; and for
            dropout, whose masks depend on it, the step and the rank, never on what else draws random numbers.
        compile: whether layers are compiled (``torch.compile``); by default on CUDA alone.  What is compiled is
            compiled in the first step and the first evaluation, or by ``warm_up``.
        fp8: whether products of layers are made in float8, under a plan in bf16.
        capacity_factor: how many of a microbatch's choices an expert takes, of an even load: the first ones in the
            microbatch's order; the others are dropped in training.  None: no choice is.

    Raises:
        PlanError: the plan breaks a rule of the model or of the world, or of float8 products.
        ConfigError: the model's family has no record, the device or the model has no float8 products, the model has
            no experts to limit or is not what its config describes, or ranks were given different plans, models,
            seeds, capacities or weights; the model is left as it was.
        CheckpointError: ``weights`` are not those of the model, quantised or not finite.
    """
    asked = _checked(model, plan, world, weights, seed, capacity_factor, fp8=fp8)
    grid = Grid(plan, asked.world, copied=copies(asked.spec, plan), folded=folds_sequence(plan, asked.spec))
    capacity = None if capacity_factor is None else Capacity(capacity_factor, grid)
    biases = router_biases(asked.model, asked.family, asked.spec)
    compiled = compiles(compile, asked.world.device, asked.spec)
    stages = _cut_stages(asked, grid, capacity, compiled=compiled, fp8=fp8)
    parts = [part for stage in stages for part in parts_of(stage, asked.spec, grid)]
    chunks = tuple(chunk_of(stage, asked.spec, grid) for stage in stages)
    for stage in stages:
        if isinstance(stage, WholeStage):
            stage.end_at_head()
    unsharded = [unit for chunk in chunks for unit in chunk.unsharded]
    parameters = [local_parameter(part, held_of(part, unsharded), grid) for part in parts]
    lasting = [buffer for stage in stages for buffer in lasting_of(stage, grid)]
    given = [buffer for buffer in lasting if asked.weights is not None and asked.weights.find(buffer.name) is not None]
    together(lambda: fill([*parameters, *given], asked.values, asked.twins))
    for stage in stages:
        stage.train()
    return ParallelModel(
        grid,
        asked.spec,
        asked.config,
        chunks,
        {part.name: getattr(part.module, part.attribute) for part in parts if part.layout.zero},
        [*parameters, *lasting],
        replicated_of(parts, parameters, grid),
        seed,
        asked.adapter,
        compiled=compiled,
        balance=balance_of(asked.model.config, asked.spec, grid, stages),
        loads=loads_of(biases, grid, stages),
        capacity=capacity,
    )


@dataclass(frozen=True)
class _Asked:
    """A model that can run under the plan it was given with.

    Attributes:
        weights: given beside the model, with the model's own for adapters that they lack; None without.
        values: where all values come from: ``weights``, or the model's own, or a seed.
        twins: a tied head that ``weights`` have a copy of, and the embedding.
    """

    model: PreTrainedModel
    world: World
    family: Family
    spec: ModelSpec
    config: PretrainedConfig
    adapter: Adapter | None
    weights: GivenWeights | None
    values: Weights
    twins: dict[str, str]


def _checked(
    given: nn.Module,
    plan: Plan,
    world: World | None,
    weights: GivenWeights | None,
    seed: int,
    capacity_factor: float | None,
    *,
    fp8: bool,
) -> _Asked:
    """Refuse what cannot run, and leave the model as it is."""
    if isinstance(given, ParallelModel):
        raise ConfigError("this model is parallel already; give parallelize a new one")
    model = check_model(wrapped(given))
    adapter = adapter_of(model)
    if not isinstance(plan, Plan):
        raise PlanError(f"parallelize takes a Plan, got {type(plan).__name__}; load a file with Plan.load(path)")
    world = world or init_world()
    check_surroundings(world.device, gradients=False)
    check_agreement(model, plan, seed, capacity_factor, own_weights=weights is None or adapter is not None)
    config = config_of(model)
    family, spec = family_of(config), spec_of(model)
    plan.validate(spec, world.world_size)
    check_runnable(plan)
    check_capacity(capacity_factor, model, family, spec, plan)
    if fp8:
        _check_fp8(model, plan, family, spec, world)
    refuse_unproved(config, uses_tp=any(strategy.tp > 1 for strategy in plan.layers), uses_pp=plan.pp > 1)
    twins: dict[str, str] = {}
    if weights is not None:
        weights = weights if adapter is None else CompletedWeights(weights, _own_weights(model, seed))
        twins = check_names(weights, model, dict([spec.tied_names]) if spec.tied_names else {})
    return _Asked(model, world, family, spec, config, adapter, weights, weights or _own_weights(model, seed), twins)


def _cut_stages(
    asked: _Asked, grid: Grid, capacity: Capacity | None, *, compiled: bool, fp8: bool
) -> tuple[Stage, ...]:
    """This rank's stages, of parameters on meta."""
    model, family = asked.model, asked.family
    use_attention(model, family)
    _to_meta(model)
    if fp8:
        for link in chain_of(model, family):
            use_fp8(model.get_submodule(link.path))
    stages = tuple(stages_of(model, family, grid))
    compiler = LayerCompiler() if compiled else None
    for stage in stages:
        cut(stage, family, asked.spec, grid, compiler, capacity)
    return stages


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
