"""A plan as command-line arguments of Megatron-LM.

Takes a plan whose layers have one strategy, apart from recomputing the first of every stage; gives arguments, or
one sentence that names what Megatron-LM cannot say.  Names and meanings are those of
``megatron/training/arguments.py``; ZeRO 2 and 3 are those of Megatron-FSDP (its user guide, ``docs``), ZeRO 1 is
the distributed optimizer.
"""

from __future__ import annotations

from galvatron.plan.plan import LayerStrategy, Plan

from .uniform import one_strategy, recomputed_prefixes, refuse

SYSTEM = "Megatron-LM"
SHARDING = {2: "optim_grads", 3: "optim_grads_params"}


def to_megatron(plan: Plan) -> tuple[str, ...]:
    """The arguments that follow from ``plan``, a string each, in an order for people.

    Raises:
        PlanError: the plan is invalid, or has what Megatron-LM cannot say.
    """
    plan.validate()
    strategy = one_strategy(plan, SYSTEM, ignoring_recompute=True)
    _check(plan, strategy)
    return (
        *_degrees(strategy),
        *_pipeline(plan),
        *_zero(plan, strategy),
        *_recompute(plan),
        *_pair("--micro-batch-size", plan.micro_batch_size // strategy.dp),
        *_pair("--global-batch-size", plan.global_batch_size),
        *_pair("--seq-length", plan.seq_len),
        *(() if plan.precision == "fp32" else (f"--{plan.precision}",)),
        *(("--grad-reduce-in-bf16",) if plan.grad_reduce_dtype == "bf16" else ()),
    )


def _check(plan: Plan, strategy: LayerStrategy) -> None:
    if strategy.ulysses > 1 and strategy.cp > 1:
        raise refuse(SYSTEM, f"ulysses={strategy.ulysses} and cp={strategy.cp} in one layer in this export")
    if plan.schedule == "zero_bubble":
        raise refuse(SYSTEM, "schedule=zero_bubble")
    if plan.schedule == "gpipe" and plan.num_microbatches > 1:
        raise refuse(SYSTEM, f"schedule=gpipe with {plan.num_microbatches} microbatches (it runs 1f1b)")
    if plan.grad_reduce_dtype == "bf16" and plan.precision != "bf16":
        raise refuse(SYSTEM, f"grad_reduce_dtype=bf16 with precision={plan.precision}")


def _pair(name: str, value: object) -> tuple[str, str]:
    return name, str(value)


def _degrees(strategy: LayerStrategy) -> tuple[str, ...]:
    context = strategy.ulysses * strategy.cp
    arguments = _pair("--tensor-model-parallel-size", strategy.tp)
    return (
        *arguments,
        *(("--sequence-parallel",) if strategy.tp > 1 else ()),
        *_pair("--context-parallel-size", context),
        *(_pair("--cp-comm-type", "a2a" if strategy.ulysses > 1 else "p2p") if context > 1 else ()),
        *_pair("--expert-model-parallel-size", strategy.ep),
    )


def _pipeline(plan: Plan) -> tuple[str, ...]:
    """Equal stages by their number, others by the layout: E, t and L are embedding, layer and loss; | ends a chunk."""
    size = _pair("--pipeline-model-parallel-size", plan.pp)
    if len(set(plan.layers_per_stage)) == 1:
        if plan.model_chunks == 1:
            return size
        return *size, *_pair("--num-layers-per-virtual-pipeline-stage", plan.layers_per_stage[0])
    chunks = [f"t*{count}" for count in plan.layers_per_stage]
    return *size, *_pair("--pipeline-model-parallel-layout", f"E{'|'.join(chunks)}L")


def _zero(plan: Plan, strategy: LayerStrategy) -> tuple[str, ...]:
    if strategy.zero == 0:
        return ()
    arguments: tuple[str, ...] = ("--use-distributed-optimizer",)
    if strategy.dp_replicate > 1:
        arguments += _pair("--num-distributed-optimizer-instances", strategy.dp_replicate)
    if strategy.zero == 1:
        return arguments
    sharding = _pair("--data-parallel-sharding-strategy", SHARDING[strategy.zero])
    # the user guide requires the last two with the first
    fsdp = (
        "--use-megatron-fsdp",
        *sharding,
        "--no-gradient-accumulation-fusion",
        *_pair("--ckpt-format", "fsdp_dtensor"),
    )
    return *arguments, *fsdp


def _recompute(plan: Plan) -> tuple[str, ...]:
    """All layers (uniform, each by itself), none, or the first of every stage or chunk (block)."""
    counts = recomputed_prefixes(plan, SYSTEM)
    if not any(counts):
        return ()
    most = max(counts)
    granularity = _pair("--recompute-granularity", "full")
    if counts == plan.layers_per_stage:
        return *granularity, *_pair("--recompute-method", "uniform"), *_pair("--recompute-num-layers", 1)
    if any(count != min(most, length) for count, length in zip(counts, plan.layers_per_stage, strict=True)):
        raise refuse(SYSTEM, f"stages that recompute different numbers of layers, and here they do {list(counts)}")
    return *granularity, *_pair("--recompute-method", "block"), *_pair("--recompute-num-layers", most)
