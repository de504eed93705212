"""What a plan must obey.  The search proposes and the runtime accepts by these same functions."""

from __future__ import annotations

from galvatron.core.errors import PlanError
from galvatron.core.job import TrainSection
from galvatron.core.model import ModelSpec, UnitName

from .axes import StageAxes, divisors
from .plan import LayerStrategy, Plan

RUNTIME_ONLY_ONE = ("ulysses", "cp", "ep")


def check_plan(plan: Plan, spec: ModelSpec | None = None, world_size: int | None = None) -> None:
    """Raise PlanError (rule, values, remedy) at the first broken rule of ``plan``."""
    if world_size is not None and plan.world_size != world_size:
        raise PlanError(
            f"the plan is for world_size={plan.world_size} but {world_size} processes run; "
            f"start {plan.world_size} processes or search a plan for {world_size}"
        )
    _divides("number of stages pp", plan.pp, "world_size", plan.world_size)
    _divides("num_microbatches", plan.num_microbatches, "global_batch_size", plan.global_batch_size)
    if sum(plan.layers_per_stage) != len(plan.layers):
        raise PlanError(
            f"layers_per_stage={list(plan.layers_per_stage)} must sum to the {len(plan.layers)} layers "
            "that have a strategy; change one of them"
        )
    if spec is not None and len(plan.layers) != spec.num_layers:
        raise PlanError(
            f"the plan has {len(plan.layers)} layers but model {spec.name} has {spec.num_layers}; search a plan for it"
        )
    names: list[tuple[str, UnitName]] = [("embedding", "embedding")]
    names += [(f"layer {i}", "layer") for i in range(len(plan.layers))] + [("head", "head")]
    seen: set[tuple[UnitName, LayerStrategy]] = set()
    for (label, unit), strategy in zip(names, plan.strategies(), strict=True):
        if (unit, strategy) in seen:
            continue
        seen.add((unit, strategy))
        problem = check_strategy(strategy, unit, spec, plan.stage_size, plan.micro_batch_size, plan.seq_len)
        if problem:
            raise PlanError(f"{label}: {problem}")
    if spec is not None and spec.tied_embeddings and not _same_shards(plan.embedding, plan.head):
        raise PlanError(
            f"tied embeddings need equal cuts of embedding ({plan.embedding}) and head ({plan.head}); "
            "give both the same tp, dp_shard, dp_replicate and zero"
        )


def check_plan_for_job(plan: Plan, train: TrainSection) -> None:
    """Raise PlanError if ``plan`` was made for another batch, sequence length or precision than a job's."""
    for name in ("global_batch_size", "seq_len", "precision", "grad_reduce_dtype"):
        planned, wanted = getattr(plan, name), getattr(train, name)
        if planned != wanted:
            raise PlanError(f"the plan has {name}={planned} but the job has {name}={wanted}; search a plan for the job")


def check_strategy(
    strategy: LayerStrategy,
    unit: UnitName,
    spec: ModelSpec | None,
    stage_size: int,
    micro_batch_size: int,
    seq_len: int,
) -> str | None:
    """The first rule a strategy breaks in a stage of ``stage_size`` devices, as a sentence; None if it breaks none."""
    if strategy.num_devices != stage_size:
        return (
            f"the degrees of ({strategy}) multiply to {strategy.num_devices} but a stage has {stage_size} devices; "
            "change tp, dp_shard or dp_replicate"
        )
    axes = StageAxes(stage_size)
    stacked = 1
    for name in ("tp", "ulysses", "cp", "dp_shard", "dp_replicate"):
        stacked *= getattr(strategy, name)
        if stacked not in axes.degrees:
            choices = ", ".join(map(str, axes.degrees))
            return (
                f"{name}={getattr(strategy, name)} makes a stacked degree of {stacked}, which must be a product of "
                f"the stage's innermost axes; choose from {choices}"
            )
    for name in RUNTIME_ONLY_ONE:
        if getattr(strategy, name) != 1:
            return f"{name}={getattr(strategy, name)} is not supported yet; set {name} to 1"
    if strategy.recompute == "selective":
        return "recompute=selective is not supported yet; choose none or full"
    if unit != "layer" and strategy.recompute != "none":
        return f"recompute={strategy.recompute} is for layers; set it to none for the {unit}"
    if seq_len % strategy.sequence_degree:
        return f"tp={strategy.tp} must divide seq_len={seq_len}; choose {_choices(seq_len, axes)}"
    if micro_batch_size % strategy.dp:
        return (
            f"dp={strategy.dp} must divide the microbatch of {micro_batch_size} sequences; "
            "use fewer microbatches, a larger global batch or more tp"
        )
    return _cut_problem(strategy, unit, spec, axes) if spec is not None else None


def _cut_problem(strategy: LayerStrategy, unit: UnitName, spec: ModelSpec, axes: StageAxes) -> str | None:
    for parameter in spec.unit(unit).parameters:
        cut = parameter.cut
        if cut is not None and cut.uneven == "refuse" and cut.blocks % strategy.tp:
            choices = _choices(cut.blocks, axes)
            return f"tp={strategy.tp} must divide the {cut.blocks} blocks of {parameter.name}; choose {choices}"
        if cut is not None and cut.uneven == "whole" and cut.blocks % strategy.tp and strategy.tp % cut.blocks:
            return (
                f"tp={strategy.tp} must divide or be a multiple of the {cut.blocks} blocks of {parameter.name}; "
                f"choose {_choices(cut.blocks, axes)}"
            )
        if cut is not None and cut.uneven == "ceil" and cut.blocks < strategy.tp:
            return f"tp={strategy.tp} must not exceed the {cut.blocks} rows of {parameter.name}; lower tp"
    return None


def _same_shards(a: LayerStrategy, b: LayerStrategy) -> bool:
    return (a.tp, a.dp_shard, a.dp_replicate, a.zero) == (b.tp, b.dp_shard, b.dp_replicate, b.zero)


def _divides(name: str, value: int, of_name: str, of: int) -> None:
    if of % value:
        raise PlanError(f"{name}={value} must divide {of_name}={of}; choose {', '.join(map(str, divisors(of)))}")


def _choices(n: int, axes: StageAxes) -> str:
    return ", ".join(str(d) for d in axes.degrees if n % d == 0)
