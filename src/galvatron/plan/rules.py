"""What a plan must obey.  The search proposes and the runtime accepts by these same functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from galvatron.core.errors import PlanError
from galvatron.core.job import TrainSection
from galvatron.core.model import ENDS, LayerKind, ModelSpec, UnitName
from galvatron.core.units import counted

from .axes import StageAxes, divisors
from .plan import LayerStrategy, Plan, Schedule

STACKED_SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b")
"""Those of models of several stacks."""
MAX_LISTED = 8


def check_plan(plan: Plan, spec: ModelSpec | None = None, world_size: int | None = None) -> None:
    """Raise PlanError (rule, values, remedy) at the first broken rule of ``plan``."""
    if world_size is not None and plan.world_size != world_size:
        raise PlanError(
            f"the plan is for world_size={plan.world_size} but {world_size} processes run; "
            f"start {plan.world_size} processes or search a plan for {world_size}"
        )
    if len(plan.layers_per_stage) % plan.model_chunks:
        raise PlanError(
            f"model_chunks={plan.model_chunks} must divide the {len(plan.layers_per_stage)} entries of "
            f"layers_per_stage; choose {listed(divisors(len(plan.layers_per_stage)))}"
        )
    _divides("number of stages pp", plan.pp, "world_size", plan.world_size)
    _divides("num_microbatches", plan.num_microbatches, "global_batch_size", plan.global_batch_size)
    problem = check_schedule(plan.schedule, plan.pp, plan.num_microbatches, plan.model_chunks)
    if problem:
        raise PlanError(problem)
    if sum(plan.layers_per_stage) != len(plan.layers):
        raise PlanError(
            f"layers_per_stage={list(plan.layers_per_stage)} must sum to the {len(plan.layers)} layers "
            "that have a strategy; change one of them"
        )
    if spec is not None and len(plan.layers) != spec.num_layers:
        raise PlanError(
            f"the plan has {len(plan.layers)} layers but model {spec.name} has {spec.num_layers}; search a plan for it"
        )
    _check_units(plan, spec)
    if spec is not None and spec.task == "contrast" and plan.num_microbatches > 1:
        raise PlanError(
            f"num_microbatches={plan.num_microbatches} would contrast the pairs of a microbatch alone, not of the "
            "batch; set it to 1"
        )
    if spec is not None and spec.stacks > 1 and plan.schedule not in STACKED_SCHEDULES:
        raise PlanError(
            f"schedule={plan.schedule} is for models of one stack of layers, and {spec.name} has {spec.stacks}; "
            f"choose {listed(STACKED_SCHEDULES)}"
        )
    if spec is not None and spec.ends_alike and plan.embedding != plan.head:
        why = "tied embeddings need" if spec.tied_embeddings else f"the head of {spec.task} sees inputs and needs"
        raise PlanError(
            f"{why} equal cuts of embedding ({plan.embedding}) and head ({plan.head}); "
            "give both the same tp, dp_shard, dp_replicate and zero"
        )
    problem = None if spec is None else spec.sequence_problem(plan.seq_len)
    if problem:
        raise PlanError(problem)


def _check_units(plan: Plan, spec: ModelSpec | None) -> None:
    kinds = ["layer"] * len(plan.layers) if spec is None else [kind.name for kind in spec.kind_of_layers()]
    names = [("embedding", "embedding"), *((f"layer {i}", kind) for i, kind in enumerate(kinds)), ("head", "head")]
    seen: set[tuple[UnitName, LayerStrategy]] = set()
    for (label, unit), strategy in zip(names, plan.strategies(), strict=True):
        if (unit, strategy) not in seen:
            seen.add((unit, strategy))
            problem = check_strategy(strategy, unit, spec, plan.stage_size, plan.micro_batch_size, plan.seq_len)
            if problem:
                raise PlanError(f"{label}: {problem}")


def folds_sequence(plan: Plan, spec: ModelSpec) -> bool:
    """Whether sequences are cut from both ends (``plan.axes``): where a ring attends causally."""
    kinds = spec.kind_of_layers()
    return any(kind.causal and strategy.cp > 1 for kind, strategy in zip(kinds, plan.layers, strict=True))


def check_plan_for_job(plan: Plan, train: TrainSection) -> None:
    """Raise PlanError if ``plan`` was made for another batch, sequence length or precision, or cannot run yet."""
    check_runnable(plan)
    for name in ("global_batch_size", "seq_len", "precision", "grad_reduce_dtype"):
        planned, wanted = getattr(plan, name), getattr(train, name)
        if planned != wanted:
            raise PlanError(f"the plan has {name}={planned} but the job has {name}={wanted}; search a plan for the job")


def check_runnable(plan: Plan) -> None:
    """Raise PlanError if the plan says that it needs what the runtime cannot do."""
    if plan.what_if:
        raise PlanError(
            f"the plan is for planning alone: its what_if is {'; '.join(plan.what_if)}; search one that can run"
        )


def check_schedule(schedule: Schedule, pp: int, num_microbatches: int, model_chunks: int) -> str | None:
    """The first rule that the outside of a plan breaks, as a sentence; None if it breaks none."""
    if (schedule == "interleaved" and model_chunks == 1) or (schedule in ("gpipe", "1f1b") and model_chunks > 1):
        return (
            f"model_chunks={model_chunks} does not go with schedule={schedule}; use interleaved with 2 or more chunks, "
            "zero_bubble with any number, or set model_chunks to 1"
        )
    chunked = f"schedule={schedule} with model_chunks={model_chunks}"
    if model_chunks > 1 and pp == 1:
        return f"{chunked} needs 2 or more stages, got pp=1; use 1f1b, or divide the layers over more stages"
    if model_chunks > 1 and num_microbatches % pp:
        return (
            f"num_microbatches={num_microbatches} must be a multiple of pp={pp} under {chunked}; "
            f"choose {pp}, {2 * pp}, {3 * pp} or another multiple"
        )
    return None


def check_strategy(
    strategy: LayerStrategy,
    unit: UnitName,
    spec: ModelSpec | None,
    stage_size: int,
    micro_batch_size: int,
    seq_len: int,
) -> str | None:
    """The first rule a strategy breaks in a stage of ``stage_size`` devices, as a sentence; None if it breaks none."""
    return (
        check_degrees(strategy, unit, stage_size)
        or check_cuts(strategy, unit, spec, stage_size, seq_len)
        or check_batch(strategy, micro_batch_size)
    )


def check_degrees(strategy: LayerStrategy, unit: UnitName, stage_size: int) -> str | None:
    """Whether the degrees fill a stage and are products of its axes, and fit this kind of unit."""
    if strategy.num_devices != stage_size:
        has = counted(stage_size, "device")
        return (
            f"the degrees of ({strategy}) multiply to {strategy.num_devices} but a stage has {has}; "
            "change tp, ulysses, cp, dp_shard or dp_replicate"
        )
    axes, stacked = StageAxes(stage_size), 1
    for name in ("tp", "ulysses", "cp", "dp_shard", "dp_replicate"):
        stacked *= getattr(strategy, name)
        if stacked not in axes.degrees:
            return (
                f"{name}={getattr(strategy, name)} makes a stacked degree of {stacked}, which must be a product of "
                f"the stage's innermost axes; choose from {listed(axes.degrees)}"
            )
    if strategy.tp * strategy.ep not in axes.degrees:
        return (
            f"ep={strategy.ep} makes tp x ep {strategy.tp * strategy.ep}, which must be a product of the stage's "
            f"innermost axes; choose from {listed(axes.degrees)}"
        )
    if unit not in ENDS:
        return None
    for name in ("cp", "ep"):
        if getattr(strategy, name) != 1:
            return (
                f"{name}={getattr(strategy, name)} is for layers; set it to 1 for the {unit} (ulysses cuts its tokens)"
            )
    if strategy.recompute != "none":
        return f"recompute={strategy.recompute} is for layers; set it to none for the {unit}"
    return None


def check_batch(strategy: LayerStrategy, micro_batch_size: int) -> str | None:
    """Whether data parallelism divides a microbatch."""
    if micro_batch_size % strategy.dp:
        return (
            f"dp_shard x dp_replicate = {strategy.dp} must divide the microbatch of "
            f"{counted(micro_batch_size, 'sequence')}; use fewer microbatches, a larger global batch or more tp"
        )
    return None


def check_cuts(
    strategy: LayerStrategy, unit: UnitName, spec: ModelSpec | None, stage_size: int, seq_len: int
) -> str | None:
    """Whether tokens, heads, experts and parameters divide by what cuts them."""
    axes = StageAxes(stage_size)
    if spec is not None and unit in ENDS and spec.ends == "whole" and strategy.ulysses > 1:
        return f"ulysses={strategy.ulysses} is for layers: the {unit} of {spec.name} sees whole sequences; set it to 1"
    if spec is not None and unit not in ENDS:
        kind = spec.kind(unit)
        problem = _attention_problem(strategy, kind, kind.tokens(seq_len), axes) or _expert_problem(
            strategy, kind, axes
        )
        if problem:
            return problem
    if spec is None:  # nobody knows what sequences are of
        return None
    return _token_problem(strategy, unit, spec, seq_len, axes) or _parameter_problem(strategy, unit, spec, axes)


def _token_problem(
    strategy: LayerStrategy, unit: UnitName, spec: ModelSpec, seq_len: int, axes: StageAxes
) -> str | None:
    """Patches are filled up (``plan.filling``), unless a ring would pass on what fills them; other tokens divide."""
    degree = strategy.sequence_degree
    names = " x ".join(name for name in ("tp", "ulysses", "cp") if getattr(strategy, name) > 1)
    for tokens, patches in _sequences(unit, spec, seq_len):
        if patches % axes.num_devices and strategy.cp > 1:
            return f"cp={strategy.cp} cannot cut {patches} patches, which {axes.num_devices} do not divide; set cp to 1"
        if 0 < patches < degree:
            return f"{names}={degree} must not exceed the {patches} patches of an image; lower it"
        if tokens % degree and not patches:
            return f"{names}={degree} must divide seq_len={tokens}; choose {_choices(tokens, axes)}"
    return None


def _sequences(unit: UnitName, spec: ModelSpec, seq_len: int) -> Iterator[tuple[int, int]]:
    """(tokens, how many of them are patches: all or none) of every sort of sequence that a unit sees."""
    if unit == "embedding" and spec.ends == "tokens":
        yield seq_len, 0
        return
    own = spec.layers if spec.ends == "whole" else spec.layers[-1:]
    for kind in own if unit in ENDS else (spec.kind(unit),):
        yield kind.tokens(seq_len), spec.patches(kind, seq_len)


def _attention_problem(strategy: LayerStrategy, kind: LayerKind, tokens: int, axes: StageAxes) -> str | None:
    """Ulysses deals heads out; kv heads fewer than the degree are replicated.

    Causal rings fold the sequence, of this layer and of all others, whatever their degree.
    """
    if strategy.tp > 1 and not kind.cuttable:
        return f"tp={strategy.tp} needs layers that can be cut, which {kind.name} cannot surely; set tp to 1"
    if strategy.ulysses * strategy.cp > 1 and not kind.asks_for_attention:
        name, degree = ("ulysses", strategy.ulysses) if strategy.ulysses > 1 else ("cp", strategy.cp)
        return f"{name}={degree} needs layers whose attention can be replaced, which {kind.name} has not; set it to 1"
    heads = strategy.tp * strategy.ulysses
    if strategy.ulysses > 1 and kind.num_heads % heads:
        return (
            f"tp x ulysses={heads} must divide num_heads={kind.num_heads} of {kind.name}; "
            f"choose {_choices(kind.num_heads, axes)}"
        )
    if strategy.ulysses > 1 and kind.num_kv_heads % heads and heads % kind.num_kv_heads:
        return (
            f"tp x ulysses={heads} must divide or be a multiple of num_kv_heads={kind.num_kv_heads} of {kind.name}; "
            f"choose {_choices(kind.num_kv_heads, axes)}"
        )
    if strategy.cp > 1 and kind.drops_attention:
        return (
            f"cp={strategy.cp} cannot draw dropout on what attention weighs, or cap scores, one of which {kind.name} "
            "does; set the config's attention dropout to 0, or use ulysses"
        )
    most = max(degree for degree in axes.degrees if tokens % degree == 0)
    if strategy.cp > 1 and kind.causal and tokens % (2 * most):
        return (
            f"cp={strategy.cp} folds the sequence, for which seq_len={tokens} must be a multiple of {2 * most}, "
            f"twice what a layer may cut it by; choose {tokens - tokens % (2 * most) or 2 * most} or another, or cp=1"
        )
    return None


def _expert_problem(strategy: LayerStrategy, kind: LayerKind, axes: StageAxes) -> str | None:
    if strategy.ep == 1:
        return None
    if not kind.num_experts:
        return f"ep={strategy.ep} needs experts, which {kind.name} has not; set ep to 1"
    if any(p.experts and len(p.shape) == 3 and p.cut is None for p in kind.parameters):
        return f"ep={strategy.ep} needs experts of a known kind, which those of {kind.name} are not; set ep to 1"
    if kind.num_experts % strategy.ep:
        return (
            f"ep={strategy.ep} must divide the {kind.num_experts} experts of {kind.name}; "
            f"choose {_choices(kind.num_experts, axes)}"
        )
    return None


def _parameter_problem(strategy: LayerStrategy, unit: UnitName, spec: ModelSpec, axes: StageAxes) -> str | None:
    for parameter in spec.unit(unit).parameters:
        cut = parameter.cut
        if cut is None:
            continue
        if (blocks := cut.misfit(strategy.tp)) is not None:
            must = "divide" if cut.uneven == "refuse" else "divide or be a multiple of"
            choices = _choices(blocks, axes)
            return f"tp={strategy.tp} must {must} the {blocks} blocks of {parameter.name}; choose {choices}"
        if cut.leaves_ranks_empty(strategy.tp):
            return f"tp={strategy.tp} leaves a rank without any of the {cut.blocks} rows of {parameter.name}; lower tp"
    return None


def _divides(name: str, value: int, of_name: str, of: int) -> None:
    if of % value:
        raise PlanError(f"{name}={value} must divide {of_name}={of}; choose {listed(divisors(of))}")


def _choices(n: int, axes: StageAxes) -> str:
    return listed(d for d in axes.degrees if n % d == 0)


def listed(numbers: Iterable[int | str]) -> str:
    """All of them, or the first and the last where there are many."""
    texts = list(map(str, numbers))
    return ", ".join(texts if len(texts) <= 2 * MAX_LISTED else [*texts[:MAX_LISTED], "...", *texts[-MAX_LISTED:]])
